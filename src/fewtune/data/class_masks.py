"""Masks of several classes: PNG files of class numbers, grey or with a palette."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fewtune.data.masks import MaskData, MaskSplit, save_png
from fewtune.errors import DataError

LARGEST = 255
"""The largest number that an 8-bit mask can hold."""


def open_class_mask(path: str | Path) -> np.ndarray:
    """The class numbers of a mask, uint8 [H, W]: grey values, or the places in a palette, whatever its colours.

    Raises:
        DataError: the file is missing or damaged, or holds colours and no numbers, or numbers above 255.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.format == "JPEG" or image.mode not in ("1", "L", "P", "I;16", "I"):
                kind = "a JPEG, which blurs numbers" if image.format == "JPEG" else f"a picture of mode {image.mode}"
                raise DataError(
                    f"{path} is {kind}; a mask of several classes is a PNG of class numbers or a palette PNG"
                )
            numbers = np.asarray(image).astype(np.int64)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the mask {path}: {' '.join(str(error).split())}") from error
    if numbers.size and not 0 <= numbers.min() <= numbers.max() <= LARGEST:
        raise DataError(f"{path} holds the number {numbers.max()}; class numbers lie in 0..{LARGEST}")
    return numbers.astype(np.uint8)


def save_class_mask(classes: np.ndarray, path: Path) -> None:
    """Write class numbers [H, W] as a PNG with a palette, whole or not at all."""
    image = Image.fromarray(classes.astype(np.uint8), "P")
    image.putpalette([value for colour in palette() for value in colour])
    save_png(image, path)


def palette() -> list[tuple[int, int, int]]:
    """256 colours that tell neighbours apart, the first black: Pascal VOC's, whose bits are those of the number."""
    colours = []
    for number in range(256):
        parts = [0, 0, 0]
        for bit in range(8):
            parts = [part | ((number >> (3 * bit + i)) & 1) << (7 - bit) for i, part in enumerate(parts)]
        colours.append((parts[0], parts[1], parts[2]))
    return colours


@dataclass(frozen=True, eq=False)
class ClassMaskSplit(MaskSplit):
    """As `MaskSplit`, but masks are class numbers, uint8 [H, W], of so many classes; `ignore` marks what counts not."""

    classes: int = 0
    ignore: int = LARGEST

    def mask(self, index: int) -> np.ndarray:
        """The class numbers, uint8 [H, W], at the mask's own size; DataError for one that is no class."""
        numbers = open_class_mask(self.labels[index])
        strange = numbers[(numbers >= self.classes) & (numbers != self.ignore)]
        if strange.size:
            raise DataError(
                f"{self.labels[index]} holds the number {strange.max()} and the task has the classes 0 to "
                f"{self.classes - 1}; pixels that are not to count are {self.ignore} (ignore=NUMBER says otherwise)"
            )
        return numbers


def with_classes(data: MaskData, names: Sequence[str] | None, ignore: int) -> MaskData:
    """The data with masks of class numbers.

    Args:
        names: of the classes, by number; None: as many as the training masks have, called by their numbers.

    Raises:
        DataError: there are fewer than two classes.
    """
    if names is None:
        with ThreadPoolExecutor() as pool:
            masks = pool.map(open_class_mask, data.train.masks)
            largest = max((int(mask[mask != ignore].max(initial=0)) for mask in masks), default=0)
        names = [str(number) for number in range(largest + 1)]
    if len(names) < 2:
        raise DataError(
            f"{data.name}: its masks hold one class, 0, beside {ignore}, which does not count; masks of black and "
            "white are for task=segmentation"
        )
    parts: dict[str, Any] = {
        name: ClassMaskSplit(
            split.records, split.labels, split.names, split.read, split.transform, classes=len(names), ignore=ignore
        )
        for name, split in data.splits.items()
    }
    return replace(data, class_names=tuple(names), **parts)
