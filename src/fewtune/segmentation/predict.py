"""Masks of images, at the images' own sizes; all that is tested or predicted goes through `probability_maps`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fewtune.data.images import image_files, open_image, readable, with_faults
from fewtune.data.mask_transforms import Input
from fewtune.data.masks import save_mask, save_png
from fewtune.errors import DataError, Progress
from fewtune.progress import shown
from fewtune.segmentation.loaded import LoadedSegmenter, load_tuned_segmenter
from fewtune.segmentation.metrics import THRESHOLD
from fewtune.segmentation.models import Segmenter
from fewtune.segmentation.sizes import at_size
from fewtune.training.loaders import image_loader, pick_device

TINT = (255, 196, 0)
"""Colour of a painted object in an overlay, RGB."""


class _Inputs(Dataset):
    """(input tensor, own size) of every image."""

    def __init__(self, images: Sequence[Path], segmenter: Segmenter) -> None:
        self.images, self.transform = images, Input(segmenter)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(open_image(self.images[index]))


def probability_maps(
    segmenter: Segmenter,
    images: Sequence[Path],
    device: torch.device,
    *,
    batch_size: int = 1,
    workers: int = 0,
    text: str = "predict",
) -> Iterator[np.ndarray]:
    """The probability of every pixel of every image, float32 [H, W] at the image's own size, one image at a time.

    Logits are resampled to that size bilinearly, then turned into probabilities.
    """
    maps = logit_maps(segmenter, images, device, batch_size=batch_size, workers=workers, text=text)
    return (logits.sigmoid()[0].cpu().numpy() for logits in maps)


def logit_maps(
    segmenter: Segmenter,
    images: Sequence[Path],
    device: torch.device,
    *,
    batch_size: int = 1,
    workers: int = 0,
    text: str = "predict",
) -> Iterator[torch.Tensor]:
    """The logits of every pixel of every image, float32 [1 or classes, H, W] at its own size, one image at a time."""
    model = segmenter.model.eval().to(device)
    loader = image_loader(_Inputs(images, segmenter), batch_size, workers=workers)
    for inputs, sizes, _ in shown(loader, text, len(loader)):
        with torch.inference_mode():
            logits = model(inputs.to(device)).float()
            maps = [
                at_size(one[None], (height, width))[0]
                for one, (height, width) in zip(logits, sizes.tolist(), strict=True)
            ]
        yield from maps


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
    """Draw the mask of every image with nothing but a task file, and write it as PNG of the image's own size.

    Args:
        delta: the task file; its segmenter, input size and normalisation are read from it. Or the task that was loaded
            from it.
        images: image files, and folders that are searched for images.
        out: a folder; masks become NAME.png in it, overlays overlays/NAME.png. Made where it is not there.
        strict: refuse all where one image cannot be read. Else its row says why in the column `error`, which is there
            only then, and the others are predicted.
        overlays: also write each image with its object tinted and outlined.

    Returns:
        One row for every image: file, mask, width, height, painted share of the pixels, mean probability of these.

    Raises:
        DataError: a path is missing or unreadable, there is no image, or two images have one name.
    """

    def draw(task: LoadedSegmenter, files: list[Path], targets: list[Path]) -> Iterator[dict[str, Any]]:
        maps = probability_maps(task.segmenter, files, pick_device(accelerator), batch_size=batch_size, workers=workers)
        for file, target, probabilities in zip(files, targets, maps, strict=True):
            mask = probabilities >= THRESHOLD
            save_mask(mask, target)
            if overlays:
                save_png(overlay(open_image(file), mask), overlay_file(target))
            sure = float(probabilities[mask].mean()) if mask.any() else 0.0
            yield {
                "file": str(file), "mask": str(target), "width": mask.shape[1], "height": mask.shape[0],
                "painted": round(float(mask.mean()), 6), "probability": round(sure, 6),
            }  # fmt: skip

    def load(file: str | Path) -> LoadedSegmenter:
        return load_tuned_segmenter(file, progress)

    return drawn_with(draw, load, delta, images, Path(out), overlays=overlays, strict=strict)


def drawn_with(
    draw: Callable[[LoadedSegmenter, list[Path], list[Path]], Iterable[dict[str, Any]]],
    load: Callable[[str | Path], LoadedSegmenter],
    delta: str | Path | LoadedSegmenter,
    images: Iterable[str | Path],
    out: Path,
    *,
    overlays: bool,
    strict: bool,
) -> list[dict[str, Any]]:
    """One row for every image: what `draw` says of the readable ones, given the task and the files of their masks.

    `load` reads the task file, where `delta` is one; nothing is written before it is good.
    """
    given = image_files(images)
    files, faults = (given, {}) if strict else readable(given)
    if not files:
        return with_faults([], given, faults)
    targets = mask_files(files, out)
    task = delta if isinstance(delta, LoadedSegmenter) else load(delta)
    task.require_in_place()
    (out / "overlays" if overlays else out).mkdir(parents=True, exist_ok=True)
    return with_faults(list(draw(task, files, targets)), given, faults)


def overlay_file(mask: Path) -> Path:
    """Where the overlay of a mask lies."""
    return mask.parent / "overlays" / mask.name


def overlay(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image with the object tinted and its edge drawn; `mask` is bool [H, W]."""
    pixels = np.asarray(image).astype(np.float32)
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    strength = np.where(mask & ~inner, 1.0, np.where(mask, 0.35, 0.0))[..., None]
    return Image.fromarray(np.rint(pixels * (1 - strength) + np.array(TINT) * strength).astype(np.uint8))


def mask_files(files: Sequence[Path], out: Path) -> list[Path]:
    """A mask's file for every image; DataError where two images would write the same one."""
    seen: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target in seen:
            raise DataError(f"{seen[target]} and {file} would both write {target}; predict them into two folders")
        if file.resolve() == target.resolve():
            raise DataError(f"the mask of {file} would overwrite it; choose another --out")
        seen[target] = file
    return list(seen)
