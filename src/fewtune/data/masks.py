"""A mask file as booleans: True on the object, where its grey value is 128 or more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fewtune.data.images import open_image
from fewtune.errors import DataError

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
        return f"its largest grey value is {high}; multiply masks of 0 and {high} by {255 // high}"
    middle = (grey >= FAR) & (grey <= 255 - FAR)
    count = int(middle.sum())
    if lossless and count and (count > MOST_GREY * grey.size or count > int((grey > 255 - FAR).sum())):
        values, numbers = np.unique(grey[middle], return_counts=True)
        return (
            f"{count / grey.size:.1%} of its pixels are grey (mostly {values[numbers.argmax()]}), neither near 0 nor "
            f"near 255; threshold it first"
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
