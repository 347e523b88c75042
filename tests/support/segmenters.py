"""What the tests of segmenters share: a small random SamModel, the original's names for its weights, an objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel

from fewtune.segmentation.models import Segmenter, load_segmenter

SIZE, PATCH, WIDTH, CHANNELS = 128, 16, 48, 32
DEPTH, WHOLE = 4, (1, 3)


def sam_configuration() -> SamConfig:
    """Four blocks of width 48, windows of 3 x 3 patches but in blocks 1 and 3; 128 px, so 8 x 8 patches."""
    grid = {"image_size": SIZE, "patch_size": PATCH}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "window_size": 3}
    vision |= {"global_attn_indexes": list(WHOLE), "output_channels": CHANNELS, "num_pos_feats": CHANNELS // 2}
    decoder = {"hidden_size": CHANNELS, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": CHANNELS}
    decoder |= {"layer_norm_eps": 1e-5}  # the original's, which segmenters always have
    return SamConfig(
        vision_config=vision | grid,
        prompt_encoder_config=grid | {"hidden_size": CHANNELS, "mask_input_channels": 16},
        mask_decoder_config=decoder,
    )


def random_sam() -> SamModel:
    """Every weight moved away from its first value: position tables start at zero, norms at one."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = SamModel(sam_configuration()).eval()
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sam


def saved_sam(folder: Path) -> str:
    """A folder with a small SamModel, as `save_pretrained` writes it; its source."""
    random_sam().save_pretrained(folder)
    return f"hf:{folder}"


def small_sam(folder: Path, **options: Any) -> Segmenter:
    return load_segmenter(saved_sam(folder), **options)


def images(batch: int = 2, size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def masks(batch: int = 2, size: int = SIZE) -> Tensor:
    """A disc in each image, each at another place: [batch, 1, size, size] of 0 and 1."""
    place = torch.linspace(-1, 1, size)
    centres = torch.linspace(-0.5, 0.5, batch)[:, None, None]
    discs = (place[None, :, None] - centres) ** 2 + place[None, None, :] ** 2 < 0.2
    return discs[:, None].float()


def objective(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy at the size of the masks."""
    logits = nn.functional.interpolate(model(inputs), size=labels.shape[-2:], mode="bilinear")
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits))


def original_layout(sam: SamModel) -> dict[str, Tensor]:
    """The state dict that segment-anything's own model of this size has, name by name."""
    theirs: dict[str, Tensor] = {}
    state = sam.state_dict()

    def copy(new: str, old: str, parts: tuple[str, ...] = ("weight", "bias")) -> None:
        for part in parts:
            theirs[f"{new}.{part}"] = state[f"{old}.{part}"]

    encoder, decoder, prompt = "image_encoder", "mask_decoder", "prompt_encoder"
    theirs[f"{encoder}.pos_embed"] = state["vision_encoder.pos_embed"]
    copy(f"{encoder}.patch_embed.proj", "vision_encoder.patch_embed.projection")
    for i in range(DEPTH):
        ours, block = f"vision_encoder.layers.{i}", f"{encoder}.blocks.{i}"
        for new, old in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.lin1", "mlp.lin1")):
            copy(f"{block}.{new}", f"{ours}.{old}")
        copy(f"{block}.mlp.lin2", f"{ours}.mlp.lin2")
        copy(f"{block}.attn.qkv", f"{ours}.attn.qkv")
        copy(f"{block}.attn.proj", f"{ours}.attn.proj")
        theirs[f"{block}.attn.rel_pos_h"] = state[f"{ours}.attn.rel_pos_h"]
        theirs[f"{block}.attn.rel_pos_w"] = state[f"{ours}.attn.rel_pos_w"]
    copy(f"{encoder}.neck.0", "vision_encoder.neck.conv1", ("weight",))
    copy(f"{encoder}.neck.1", "vision_encoder.neck.layer_norm1")
    copy(f"{encoder}.neck.2", "vision_encoder.neck.conv2", ("weight",))
    copy(f"{encoder}.neck.3", "vision_encoder.neck.layer_norm2")

    frequencies = state["shared_image_embedding.positional_embedding"]
    theirs[f"{prompt}.pe_layer.positional_encoding_gaussian_matrix"] = frequencies
    for i in range(4):
        copy(f"{prompt}.point_embeddings.{i}", f"{prompt}.point_embed.{i}", ("weight",))
    copy(f"{prompt}.not_a_point_embed", f"{prompt}.not_a_point_embed", ("weight",))
    copy(f"{prompt}.no_mask_embed", f"{prompt}.no_mask_embed", ("weight",))
    for i, old in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3")):
        copy(f"{prompt}.mask_downscaling.{i}", f"{prompt}.mask_embed.{old}")

    copy(f"{decoder}.iou_token", f"{decoder}.iou_token", ("weight",))
    copy(f"{decoder}.mask_tokens", f"{decoder}.mask_tokens", ("weight",))
    attentions = [f"layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "cross_attn_token_to_image")]
    attentions += [f"layers.{i}.cross_attn_image_to_token" for i in range(2)] + ["final_attn_token_to_image"]
    for name in attentions:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            copy(f"{decoder}.transformer.{name}.{part}", f"{decoder}.transformer.{name}.{part}")
    for i in range(2):
        layer = f"{decoder}.transformer.layers.{i}"
        for norm in (1, 2, 3, 4):
            copy(f"{layer}.norm{norm}", f"{layer}.layer_norm{norm}")
        copy(f"{layer}.mlp.lin1", f"{layer}.mlp.lin1")
        copy(f"{layer}.mlp.lin2", f"{layer}.mlp.lin2")
    copy(f"{decoder}.transformer.norm_final_attn", f"{decoder}.transformer.layer_norm_final_attn")
    for i, old in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2")):
        copy(f"{decoder}.output_upscaling.{i}", f"{decoder}.{old}")
    for name in (*(f"output_hypernetworks_mlps.{i}" for i in range(4)), "iou_prediction_head"):
        for i, old in ((0, "proj_in"), (1, "layers.0"), (2, "proj_out")):
            copy(f"{decoder}.{name}.layers.{i}", f"{decoder}.{name}.{old}")
    return theirs
