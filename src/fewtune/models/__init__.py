"""Backbones by name: timm, transformers, torchvision, a local checkpoint, a demo model fetched through pip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewtune.errors import ModelError, Progress
from fewtune.models.backbone import Backbone, LoadOptions, Source, channels_last, logits
from fewtune.models.sources import SOURCES, check_name, load

__all__ = [
    "SOURCES",
    "Backbone",
    "LoadOptions",
    "Source",
    "as_described",
    "backbone_from_description",
    "channels_last",
    "check_name",
    "load_backbone",
    "logits",
]


def load_backbone(
    source: str,
    *,
    num_classes: int | None,
    image_size: int | None = None,
    pretrained: bool = True,
    drop_path: float = 0.0,
    architecture: str | None = None,
    seed: int = 0,
    quantise: str | None = None,
    progress: Progress | None = None,
) -> Backbone:
    """A backbone by name.

    Args:
        source: "timm:NAME" (or just NAME), "hf:ID" or "hf:FOLDER", "torchvision:NAME", "file:PATH" (a checkpoint,
            with `architecture`), "demo:vit-small", "demo:efficientnet-lite0", or another key of `SOURCES`.
        num_classes, image_size, pretrained, drop_path, architecture, seed, quantise, progress: see `LoadOptions`.

    Raises:
        ModelError: the name is unknown (the nearest are named), or the weights cannot be had or do not fit.
        ConfigError: a number is out of its range.
    """
    options = LoadOptions(num_classes, image_size, pretrained, drop_path, architecture, seed, quantise, progress)
    return load(source, options)


def backbone_from_description(
    description: dict[str, Any], num_classes: int | None, progress: Progress | None = None
) -> Backbone:
    """The backbone that `Backbone.describe` described, with a head for `num_classes` and the described inputs."""
    _described_inputs(description)
    loaded = load_backbone(
        description["source"], num_classes=num_classes, progress=progress, **description["arguments"]
    )
    return replace(loaded, **_described_inputs(description))


def as_described(backbone: Backbone, description: dict[str, Any], num_classes: int) -> Backbone:
    """The same model, with the inputs that `Backbone.describe` described and as many classes.

    Raises:
        ModelError: the description is not complete.
    """
    return replace(backbone, num_classes=num_classes, **_described_inputs(description))


def _described_inputs(description: dict[str, Any]) -> dict[str, Any]:
    try:
        return {
            "source": description["source"],
            "arguments": description["arguments"],
            "image_size": int(description["image_size"]),
            "mean": tuple(description["mean"]),
            "std": tuple(description["std"]),
            "interpolation": description["interpolation"],
            "crop_pct": float(description["crop_pct"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the description of the backbone is not complete: {error!r}") from error
