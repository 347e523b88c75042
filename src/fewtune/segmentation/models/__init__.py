"""Segmenters by name: Segment Anything, a demo model with a pretrained decoder, a linear decoder on any backbone."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

from fewtune import quantised
from fewtune.errors import ConfigError, MissingExtra, ModelError, Progress
from fewtune.segmentation.models import saliency
from fewtune.segmentation.models.linear import load_linear
from fewtune.segmentation.models.segmenter import Segmenter

__all__ = ["Segmenter", "as_described", "load_segmenter", "segmenter_from_description"]


def load_segmenter(
    source: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    architecture: str | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
    quantise: str | None = None,
    classes: int = 1,
    progress: Progress | None = None,
) -> Segmenter:
    """A segmenter by name.

    Args:
        source: Segment Anything: "hf:facebook/sam-vit-base" (any SamModel of the hub, or a local folder), or
            "file:sam_vit_b_01ec64.pth" with architecture "sam:vit-b". The demo ViT-S with its pretrained decoder:
            "demo:vit-small-saliency". A backbone with a fresh linear decoder: "timm:NAME", "demo:vit-small",
            "hf:NAME" (ViT, DINOv2, Swin, ConvNeXt, …), or "file:PATH" with architecture "timm:NAME".
        image_size: side of the square input in pixels; None means the model's own.
        pretrained: False leaves the weights random (deterministic by `seed`).
        architecture: for "file:" the model whose weights the file holds.
        drop_path: rate of stochastic depth, for the models that have it.
        seed: of a fresh decoder; the caller's random state is not touched.
        quantise: see `fewtune.models.LoadOptions`.
        classes: maps of logits that it draws: 1, of the object, or one for each class.
        progress: told in words what slow work goes on (downloads).

    Raises:
        ModelError: the name is unknown, or the weights cannot be had or do not fit.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size must be at least 1 px, not {image_size}")
    options: dict[str, Any] = {"image_size": image_size, "pretrained": pretrained, "drop_path": drop_path, "seed": seed}
    if (config := _sam(source, architecture)) is not None:
        if classes > 1:
            raise ModelError(
                f"{source} draws one mask and the task has {classes} classes: take demo:vit-small-saliency, or a "
                "backbone such as timm:NAME, which gets a linear decoder"
            )
        segmenter = _load_sam(source, config, **options)
    elif source == f"demo:{saliency.NAME}":
        segmenter = saliency.load_saliency(progress=progress, classes=classes, **options)
    else:
        segmenter = load_linear(source, architecture=architecture, progress=progress, classes=classes, **options)
    if quantise is not None:
        quantised.quantise(segmenter.model, quantise, segmenter.head)
    said = {"architecture": architecture, "quantise": quantise}
    said = {key: word for key, word in said.items() if word is not None}
    return replace(segmenter, arguments=options | said | ({"classes": classes} if classes > 1 else {}))


def _sam(source: str, architecture: str | None) -> Any:
    """The configuration of the SamModel that `source` or the file's `architecture` names; None if it is another."""
    kind, _, name = source.partition(":")
    if kind == "file" and architecture is not None:
        kind, _, name = architecture.partition(":")
    if kind not in ("hf", "sam"):
        return None
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "hf")
    from fewtune.segmentation.models.sam_loading import sam_config

    return sam_config(f"{kind}:{name}")


def _load_sam(source: str, config: Any, *, drop_path: float, **options: Any) -> Segmenter:
    from fewtune.segmentation.models.sam_loading import load_sam, load_sam_file

    if drop_path > 0:
        raise ModelError(f"{source} has no drop path; leave drop_path at 0")
    kind, _, name = source.partition(":")
    if kind == "file":
        return load_sam_file(name, config, image_size=options["image_size"])
    if kind == "sam" and options["pretrained"]:
        raise ModelError(
            f'"{source}" names an architecture without weights: give source="file:PATH" with architecture="{source}", '
            'or source="hf:facebook/sam-vit-base"'
        )
    return load_sam(source, config, **options)


def segmenter_from_description(description: dict[str, Any], progress: Progress | None = None) -> Segmenter:
    """The segmenter that `Segmenter.describe` described, with the described inputs.

    Raises:
        ModelError: the description is not complete, or the model cannot be had.
    """
    _described_inputs(description)
    loaded = load_segmenter(description["source"], progress=progress, **description["arguments"])
    return as_described(loaded, description)


def as_described(segmenter: Segmenter, description: dict[str, Any]) -> Segmenter:
    """The same model, with the inputs that `Segmenter.describe` described.

    Raises:
        ModelError: the description is not complete.
    """
    return replace(segmenter, **_described_inputs(description))


def _described_inputs(description: dict[str, Any]) -> dict[str, Any]:
    try:
        return {
            "source": description["source"],
            "arguments": description["arguments"],
            "image_size": int(description["image_size"]),
            "mean": tuple(description["mean"]),
            "std": tuple(description["std"]),
            "interpolation": description["interpolation"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the description of the segmenter is not complete: {error!r}") from error
