"""Small backbones of several families, and made-up tasks of them with heads of different sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from delta_cases import random_task
from fewtune.delta import Delta
from fewtune.models import logits

SIZE = 32


def timm_model(name: str, **options: Any) -> nn.Module:
    """A small instance whose parameters are all moved a little, running statistics of some noise."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=8,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()


VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm_model("vit_tiny_patch16_224", **VIT, init_values=0.1),
    "swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    ),
    "convnext": lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), ls_init_value=0.1),
    "efficientnet": lambda: timm_model("tinynet_e"),
    "transformers vit": hf_vit,
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def task(model: nn.Module, k: int = 1, seed: int = 0, classes: int = 3) -> Delta:
    """A made-up task with a head of its own size; the model is as before."""
    with other_head(model, classes):
        return random_task(model, k, seed).delta


class other_head:
    """A context in which the model's head has another number of classes."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        self.linear = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
        self.classes = classes

    def __enter__(self) -> None:
        linear = self.linear
        self.before = linear.weight, linear.bias
        linear.weight = nn.Parameter(linear.weight.new_zeros(self.classes, linear.in_features))
        linear.bias = nn.Parameter(linear.weight.new_zeros(self.classes))

    def __exit__(self, *_: object) -> None:
        self.linear.weight, self.linear.bias = self.before


def applied_alone(model: nn.Module, delta: Delta, batch: Tensor) -> Tensor:
    """What the model answers with the task applied to it, [B, classes of the task]."""
    shapes = delta.selection().anatomy.shapes
    with other_head(model, shapes[delta.selection().head[-1]][0]), delta.applied_to(model), torch.inference_mode():
        return logits(model(batch))


def alone(model: nn.Module, deltas: Sequence[Delta], batch: Tensor) -> list[Tensor]:
    """Of each image what its task alone answers."""
    return [applied_alone(model, delta, batch[i : i + 1])[0] for i, delta in enumerate(deltas)]
