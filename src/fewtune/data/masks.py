"""Masks: how a file is read, and images with masks as a data set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewtune.data.images import open_image
from fewtune.data.leaks import leaks
from fewtune.data.split import DataSet, Split
from fewtune.errors import DataError
from fewtune.progress import shown

THRESHOLD = 128
"""Grey value from which a pixel belongs to the object. JPEG blurs a mask's edge, so it is cut in the middle."""
FAR = 32
"""A grey value farther than this from 0 and from 255 is neither black nor white."""
MOST_GREY = 0.05
"""Largest share of such pixels in a mask of a lossless format: smoothed edges, no more."""
LOSSY = frozenset([".jpg", ".jpeg", ".webp", ".jp2"])


def open_mask(path: str | Path) -> np.ndarray:
    """The mask at `path`, bool [H, W], upright as its EXIF data say.

    Raises:
        DataError: the file is missing or damaged, or holds grey values where black and white are expected: class
            numbers (0, 1, 2), probabilities, or a picture. Of a JPEG only the darkness is looked at, since its
            compression itself makes grey.
    """
    grey = np.asarray(open_image(path).convert("L"))
    mask = grey >= THRESHOLD
    fault = _fault(grey, mask, lossless=Path(path).suffix.lower() not in LOSSY)
    if fault:
        raise DataError(f"{path} is no mask of black (0) and white (255): {fault}")
    return mask


def _fault(grey: np.ndarray, mask: np.ndarray, *, lossless: bool) -> str | None:
    if lossless and grey.any() and not mask.any():
        high = int(grey.max())
        return (
            f"its largest grey value is {high}; multiply masks of 0 and {high} by {255 // high}; numbers of "
            "classes are for task=semantic-segmentation"
        )
    middle = (grey >= FAR) & (grey <= 255 - FAR)
    count = int(middle.sum())
    if lossless and count and (count > MOST_GREY * grey.size or count > int((grey > 255 - FAR).sum())):
        values, numbers = np.unique(grey[middle], return_counts=True)
        return (
            f"{count / grey.size:.1%} of its pixels are grey (mostly {values[numbers.argmax()]}), neither near 0 nor "
            f"near 255; threshold it first; numbers of classes are for task=semantic-segmentation"
        )
    return None


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Write a boolean mask [H, W] as an 8-bit PNG of 0 and 255, whole or not at all."""
    save_png(Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)), path)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PIL image as PNG, whole or not at all."""
    import io

    from fewtune.files import write_bytes

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True, eq=False)
class MaskSplit(Split):
    """A torch data set of what `transform` makes of (PIL RGB image, mask [H, W]); without one, of these two.

    `labels[i]` is the file of the mask.
    """

    @property
    def masks(self) -> list[Path]:
        """The files of the masks."""
        return self.labels

    @property
    def images(self) -> Any:
        """The files of the images."""
        return self.records

    def __getitem__(self, index: int) -> Any:
        image, mask = self.image(index), self.mask(index)
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"the mask {self.labels[index]} has {mask.shape[1]} x {mask.shape[0]} pixels and its image "
                f"{image.width} x {image.height}; expected the same size"
            )
        return self.transform(image, mask) if self.transform else (image, mask)

    def mask(self, index: int) -> np.ndarray:
        """The mask, bool [H, W], at its own size."""
        return open_mask(self.labels[index])

    def check(self) -> None:
        """Decode every image and mask to its end; DataError of the first that is damaged, no mask, or of another
        size than its image."""
        with ThreadPoolExecutor() as pool:
            opened = pool.map(self.with_transform(None).__getitem__, range(len(self)))
            for _ in shown(opened, "opening images and masks", len(self)):
                pass


@dataclass(frozen=True, eq=False)
class MaskData(DataSet[MaskSplit]):
    """Images with masks in splits; `val` and `test` are None where there is none."""

    def summary(self) -> str:
        """One line: images per split."""
        return f"{self.name}: {', '.join(f'{len(split)} {name}' for name, split in self.splits.items())} images"

    def check(self, *, decode: bool = True) -> None:
        """Raise a DataError for the first mistake: a split without images, a test image that is also trained or
        validated on (the same bytes), and with `decode` whatever `MaskSplit.check` finds."""
        for name, split in self.splits.items():
            if not len(split):
                raise DataError(f"{self.name}: the {name} split has no images")
        self.check_leaks()
        if decode:
            for split in self.splits.values():
                split.check()

    def check_leaks(self) -> None:
        """DataError where the content of a test image is also that of a training or validation image."""
        twins = leaks({name: split.items() for name, split in self.splits.items()})
        if twins:
            rest = f"; so are {len(twins) - 1} more" if len(twins) > 1 else ""
            raise DataError(f"{self.name}: {twins[0]}{rest}; take it out of one of the two")
