"""Segmenters by name: Segment Anything, a demo model with a pretrained decoder, a linear decoder on any backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewtune.errors import ConfigError, ModelError
from fewtune.segmentation.models.linear import load_linear
from fewtune.segmentation.models.segmenter import Segmenter

__all__ = ["Segmenter", "load_segmenter", "segmenter_from_description"]


def load_segmenter(
    source: str,
    *,
    image_size: int | None = None,
    pretrained: bool = True,
    architecture: str | None = None,
    drop_path: float = 0.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Segmenter:
    """A segmenter by name.

    Args:
        source: "timm:NAME", "demo:vit-small", or a checkpoint "file:PATH" of such a backbone (with `architecture`), each
            with a fresh linear decoder.
        image_size: side of the square input in pixels; None means the model's own.
        pretrained: False leaves the weights random (deterministic by `seed`).
        architecture: for "file:" the model whose weights the file holds, "timm:NAME" for instance.
        drop_path: rate of stochastic depth, for the models that have it.
        seed: of a fresh decoder; the caller's random state is not touched.
        progress: told in words what slow work goes on (downloads).

    Raises:
        ModelError: the name is unknown, or the weights cannot be had or do not fit.
    """
    options: dict[str, Any] = {"image_size": image_size, "pretrained": pretrained, "drop_path": drop_path, "seed": seed}
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size must be at least 1 px, not {image_size}")
    segmenter = load_linear(source, architecture=architecture, progress=progress, **options)
    return replace(segmenter, arguments=options | ({"architecture": architecture} if architecture else {}))


def segmenter_from_description(description: dict[str, Any], progress: Callable[[str], None] | None = None) -> Segmenter:
    """The segmenter that `Segmenter.describe` described, with the described inputs.

    Raises:
        ModelError: the description is not complete, or the model cannot be had.
    """
    try:
        source, arguments = description["source"], description["arguments"]
        inputs = {
            "image_size": int(description["image_size"]),
            "mean": tuple(description["mean"]),
            "std": tuple(description["std"]),
            "interpolation": description["interpolation"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the description of the segmenter is not complete: {error!r}") from error
    return replace(load_segmenter(source, progress=progress, **arguments), **inputs)
