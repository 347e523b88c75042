"""Where the methods put their modules: the blocks of the transformers and convolutional networks that they know.

Told by the class of a module, as roles are in `fewtune.neurons`: classes are named by module and qualified name and
looked up along the method resolution order, so that neither timm nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fewtune.errors import ModelError

Tokens = Literal["sequence", "windows", "grid"]


@dataclass(frozen=True)
class Parts:
    """What lies where in a class of blocks.

    mlp: the attribute that holds the feed-forward branch.
    attention: the attribute that holds attention; None where a block has none.
    projections: the layers that LoRA adapts, below the block: those that make queries and values (queries, keys and
        values where one layer makes all three); in a block without attention those of its feed-forward, in a block of
        an EfficientNet, whose feed-forward it is, its 1 x 1 convolutions.
    tokens: what a block is given. "sequence": [batch, tokens, width], all of which attend to all, so that tokens may
        be added; "windows": timm's Swin; "grid": [batch, height, width, width] or [batch, width, height, width].
    """

    mlp: str
    attention: str | None
    projections: tuple[str, ...]
    tokens: Tokens


@dataclass(frozen=True)
class Block:
    """A block of a model."""

    name: str
    module: nn.Module
    parts: Parts

    @property
    def mlp(self) -> nn.Module:
        """The feed-forward branch."""
        return self.module.get_submodule(self.parts.mlp)

    @property
    def attention(self) -> nn.Module | None:
        """The attention branch."""
        return None if self.parts.attention is None else self.module.get_submodule(self.parts.attention)


_FUSED = Parts("mlp", "attn", ("attn.qkv",), "sequence")
_APART = Parts("mlp", "attention", ("attention.q_proj", "attention.v_proj"), "sequence")
_SAM = Parts("mlp", "attn", ("attn.qkv",), "grid")
_HF = "transformers.models."

BLOCKS: dict[str, Parts] = {
    "timm.models.vision_transformer.Block": _FUSED,
    "timm.models.vision_transformer_sam.Block": _SAM,
    "timm.models.swin_transformer.SwinTransformerBlock": Parts("mlp", "attn", ("attn.qkv",), "windows"),
    "timm.models.convnext.ConvNeXtBlock": Parts("mlp", None, ("mlp.fc1", "mlp.fc2"), "grid"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": Parts("conv_pw", None, ("conv_pw",), "grid"),
    "timm.models._efficientnet_blocks.InvertedResidual": Parts("conv_pwl", None, ("conv_pw", "conv_pwl"), "grid"),
    "timm.models._efficientnet_blocks.EdgeResidual": Parts("conv_pwl", None, ("conv_pwl",), "grid"),
    _HF + "vit.modeling_vit.ViTLayer": _APART,
    _HF + "deit.modeling_deit.DeiTLayer": _APART,
    _HF + "dinov2.modeling_dinov2.Dinov2Layer": _APART,
    _HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _APART,
    _HF + "sam.modeling_sam.SamVisionLayer": _SAM,
    _HF + "sam_hq.modeling_sam_hq.SamHQVisionLayer": _SAM,
}

TRUNKS = frozenset(
    {
        "timm.models.vision_transformer.VisionTransformer",
        "timm.models.vision_transformer_sam.VisionTransformerSAM",
        "timm.models.swin_transformer.SwinTransformer",
        "timm.models.convnext.ConvNeXt",
        "timm.models.efficientnet.EfficientNet",
        _HF + "vit.modeling_vit.ViTModel",
        _HF + "deit.modeling_deit.DeiTModel",
        _HF + "dinov2.modeling_dinov2.Dinov2Model",
        _HF + "dinov2.modeling_dinov2.Dinov2Backbone",
        _HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        _HF + "sam.modeling_sam.SamVisionEncoder",
        _HF + "sam_hq.modeling_sam_hq.SamHQVisionEncoder",
    }
)
"""Classes that hold a whole image encoder, from the patch embedding to the last norm, and call each layer as a module
(so that what follows a layer can be put behind it)."""

KNOWN = (
    "ViT, Swin and ConvNeXt of timm, its EfficientNet, timm's and transformers' SAM encoder, and transformers' ViT, "
    "DeiT and DINOv2 "
    "(gps, bias, linear and full work on any model)"
)


def lineage(module: nn.Module) -> Iterable[str]:
    """Module and qualified name of a module's class and of its bases, the most derived first."""
    return (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)


def known_blocks(model: nn.Module) -> list[Block]:
    """All known blocks of a model, in its order; empty where there is none."""
    blocks = []
    for name, module in model.named_modules():
        parts = next((BLOCKS[cls] for cls in lineage(module) if cls in BLOCKS), None)
        if parts is not None:
            blocks.append(Block(name, module, parts))
    return blocks


def find_blocks(model: nn.Module, method: str) -> list[Block]:
    """All known blocks of a model, in its order.

    Raises:
        ModelError: there is none.
    """
    blocks = known_blocks(model)
    if not blocks:
        raise ModelError(f"{method} finds no block that it knows in {type(model).__name__}; it knows {KNOWN}")
    return blocks


def find_trunk(model: nn.Module, method: str) -> tuple[str, nn.Module]:
    """Name and module of the image encoder within a model.

    Raises:
        ModelError: there is none that is known.
    """
    for name, module in model.named_modules():
        if any(cls in TRUNKS for cls in lineage(module)):
            return name, module
    raise ModelError(f"{method} does not know the image encoder of {type(model).__name__}; it knows {KNOWN}")


def last_layer(branch: nn.Module) -> tuple[str, nn.Module]:
    """The layer that gives a branch's output, the last linear layer or convolution in it: its name there, itself."""
    layers = [(name, module) for name, module in branch.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ModelError(f"{type(branch).__name__} has no linear layer or convolution")
    return layers[-1]


def width_and_axis(layer: nn.Module) -> tuple[int, int]:
    """A layer's number of output channels and their axis in its output."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return (layer.out_features, -1) if isinstance(layer, nn.Linear) else (layer.out_channels, 1)
