"""Small models of every family, and every method that adds modules, with settings that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.methods import SPT, SSF, VPT, Adapter, Inserted, LoRA, Modules
from fewtune.methods.spt_plan import plan, sensitivity
from fewtune.models import logits
from fewtune.neurons import describe

CLASSES = 5
SIZES = {"vit": 32, "dinov2": 28, "swin": 64, "convnext": 64, "convnext-conv": 64, "hf-vit": 32, "efficientnet": 64}
HEADS = {"vit": "head", "dinov2": "head", "swin": "head.fc", "convnext": "head.fc", "convnext-conv": "head.fc"}
HEADS |= {"hf-vit": "classifier", "efficientnet": "classifier"}


def plain_model(kind: str, classes: int = CLASSES, seed: int = 1, **options: Any) -> nn.Module:
    """A random float64 model in evaluation mode; the same on every call."""
    torch.manual_seed(seed)
    match kind:
        case "vit":
            model = timm.create_model("test_vit", num_classes=classes, img_size=32, **options)
        case "dinov2":
            model = timm.create_model(
                "vit_small_patch14_dinov2", num_classes=classes, img_size=28, embed_dim=32, depth=2, num_heads=2,
                init_values=0.5, **options,
            )  # fmt: skip
        case "swin":
            model = timm.create_model(
                "swin_tiny_patch4_window7_224", num_classes=classes, img_size=64, embed_dim=16, depths=(2, 2),
                num_heads=(2, 4), window_size=4, **options,
            )  # fmt: skip
        case "convnext" | "convnext-conv":
            model = timm.create_model(
                "convnext_atto", num_classes=classes, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), ls_init_value=0.5,
                conv_mlp=kind == "convnext-conv", **options,
            )  # fmt: skip
        case "efficientnet":
            model = timm.create_model("test_efficientnet", num_classes=classes, **options)
        case "hf-vit":
            from transformers import ViTConfig, ViTForImageClassification

            config = ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                patch_size=8, num_labels=classes,
            )  # fmt: skip
            model = ViTForImageClassification(config)
    return model.double().eval()


def pictures(kind: str, count: int = 3) -> Tensor:
    """Random images, [count, 3, side, side]."""
    side = SIZES[kind]
    return torch.randn(count, 3, side, side, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def labels(count: int = 3) -> Tensor:
    """Classes in turn."""
    return torch.arange(count) % CLASSES


def spt(structure: Any, model: nn.Module, kind: str) -> SPT:
    """A plan of a twentieth of the model, by its own gradients."""
    anatomy = describe(model, HEADS[kind])
    got = sensitivity(model, [(pictures(kind), labels())], anatomy)
    budget = anatomy.backbone_parameters // 20
    return plan(got, model, anatomy, structure=structure, budget=budget, rank=2)


METHODS: dict[str, Callable[[nn.Module, str], Modules]] = {
    "adapter": lambda model, kind: Adapter(4),
    "adapter-both": lambda model, kind: Adapter(4, "both"),
    "lora": lambda model, kind: LoRA(3, alpha=6.0),
    "vpt-shallow": lambda model, kind: VPT(deep=False, prompts=3),
    "vpt-deep": lambda model, kind: VPT(deep=True, prompts=3),
    "ssf": lambda model, kind: SSF(),
    "spt-lora": lambda model, kind: spt("lora", model, kind),
    "spt-adapter": lambda model, kind: spt("adapter", model, kind),
}
IDENTICAL = ("adapter", "adapter-both", "lora", "spt-lora", "spt-adapter")
"""Methods after whose insertion the model gives the same outputs as before."""
MERGED = ("lora", "ssf", "spt-lora")
CONVOLUTIONAL = ("convnext", "convnext-conv", "efficientnet")
IMPOSSIBLE = {(method, kind) for method in ("vpt-shallow", "vpt-deep", "adapter-both") for kind in CONVOLUTIONAL}
PAIRS = [(method, kind) for method in METHODS for kind in SIZES if (method, kind) not in IMPOSSIBLE]


def tuned(method: str, kind: str, seed: int = 0, **options: Any) -> Inserted:
    """A method in a small model."""
    model = plain_model(kind, **options)
    return Inserted(model, (HEADS[kind],), METHODS[method](model, kind), seed=seed)


def output(model: nn.Module, kind: str) -> Tensor:
    """Logits in evaluation mode."""
    with torch.no_grad():
        return logits(model.eval()(pictures(kind)))


def train(tuner: Inserted, kind: str, steps: int = 3) -> None:
    """A few steps of AdamW with a weight decay that would show on anything frozen."""
    optimizer = torch.optim.AdamW(tuner.param_groups(lr=1e-2, head_lr=2e-2), weight_decay=0.1)
    tuner.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(logits(tuner.model(pictures(kind))), labels()).backward()
        optimizer.step()
    tuner.sync()
    tuner.model.eval()


def refused(method: str, kind: str) -> str:
    """The message of the error by which a method refuses a model."""
    try:
        tuned(method, kind)
    except ModelError as error:
        return str(error)
    return "not refused"
