"""Masks of several classes, at the images' own sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewtune.data.class_masks import palette, save_class_mask
from fewtune.data.images import open_image
from fewtune.data.masks import save_png
from fewtune.errors import Progress
from fewtune.segmentation.loaded import LoadedSegmenter, load_tuned_segmenter
from fewtune.segmentation.models import Segmenter
from fewtune.segmentation.predict import drawn_with, logit_maps, overlay_file
from fewtune.training.loaders import pick_device

KIND = "semantic-segmentation"
STRENGTH = 0.5
"""Of the colour of a class over the image."""


def load(path: str | Path, progress: Progress | None = None, backbone: Any = None) -> LoadedSegmenter:
    """A task file with its segmenter; see `fewtune.segmentation.loaded.load_tuned_segmenter`."""
    return load_tuned_segmenter(path, progress, backbone, KIND)


def class_maps(
    segmenter: Segmenter, images: Sequence[Path], device: torch.device, **options: Any
) -> Iterator[np.ndarray]:
    """The most probable class of every pixel, uint8 [H, W] at each image's own size; options as in `logit_maps`."""
    maps = logit_maps(segmenter, images, device, **options)
    return (logits.argmax(0).to(torch.uint8).cpu().numpy() for logits in maps)


def predict(
    delta: str | Path | LoadedSegmenter,
    images: Iterable[str | Path],
    out: str | Path,
    *,
    overlays: bool = True,
    batch_size: int = 1,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Progress | None = None,
    strict: bool = True,
) -> list[dict[str, Any]]:
    """Draw the mask of every image with nothing but a task file: a PNG of class numbers with a palette.

    The arguments and errors are those of `fewtune.segmentation.predict.predict`.

    Returns:
        One row for every image: file, mask, width, height, and the share of the pixels of every class.
    """

    def draw(task: LoadedSegmenter, files: list[Path], targets: list[Path]) -> Iterator[dict[str, Any]]:
        names = task.delta.metadata["class_names"]
        maps = class_maps(task.segmenter, files, pick_device(accelerator), batch_size=batch_size, workers=workers)
        for file, target, classes in zip(files, targets, maps, strict=True):
            save_class_mask(classes, target)
            if overlays:
                save_png(tinted(open_image(file), classes), overlay_file(target))
            shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
            each = {f"share({name})": round(float(share), 6) for name, share in zip(names, shares, strict=True)}
            yield {
                "file": str(file),
                "mask": str(target),
                "width": classes.shape[1],
                "height": classes.shape[0],
                **each,
            }

    def loaded(file: str | Path) -> LoadedSegmenter:
        return load(file, progress)

    return drawn_with(draw, loaded, delta, images, Path(out), overlays=overlays, strict=strict)


def coloured(classes: np.ndarray) -> Image.Image:
    """Class numbers [H, W] in the colours of the palette, RGB."""
    return Image.fromarray(np.array(palette(), dtype=np.uint8)[classes])


def tinted(image: Image.Image, classes: np.ndarray) -> Image.Image:
    """The image with the colour of each pixel's class over it; class 0, the ground as a rule, is left as it is."""
    pixels, colours = np.asarray(image).astype(np.float32), np.asarray(coloured(classes)).astype(np.float32)
    strength = np.where(classes > 0, STRENGTH, 0.0)[..., None]
    return Image.fromarray(np.rint(pixels * (1 - strength) + colours * strength).astype(np.uint8))
