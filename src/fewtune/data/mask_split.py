"""A set of images with masks: the files, and what is done to an image and its mask together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fewtune.data.check import leaks
from fewtune.data.images import open_image
from fewtune.data.inventory import Entry, Inventory
from fewtune.data.masks import open_mask
from fewtune.errors import DataError


@dataclass(frozen=True, eq=False)
class MaskSplit(Dataset):
    """A torch data set of what `transform` makes of (PIL RGB image, bool mask [H, W]); without one, of these two."""

    images: Sequence[Path]
    masks: Sequence[Path]
    names: Sequence[str]
    """What messages call each image: its path relative to the data set's folder."""
    transform: Callable[[Image.Image, np.ndarray], Any] | None = None

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.masks) == len(self.names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, mask = self.image(index), self.mask(index)
        if mask.shape != (image.height, image.width):
            raise DataError(_other_size(self.masks[index], mask, image))
        return self.transform(image, mask) if self.transform else (image, mask)

    def image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB at its own size."""
        return open_image(self.images[index])

    def mask(self, index: int) -> np.ndarray:
        """The mask, bool [H, W], at its own size."""
        return open_mask(self.masks[index])

    def with_transform(self, transform: Callable[[Image.Image, np.ndarray], Any] | None) -> MaskSplit:
        """The same images under another transform."""
        return replace(self, transform=transform)

    def subset(self, indices: Iterable[int]) -> MaskSplit:
        """The images at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            images=[self.images[i] for i in chosen],
            masks=[self.masks[i] for i in chosen],
            names=[self.names[i] for i in chosen],
        )

    def joined(self, other: MaskSplit) -> MaskSplit:
        """These images, then those of another split."""
        return replace(
            self,
            images=[*self.images, *other.images],
            masks=[*self.masks, *other.masks],
            names=[*self.names, *other.names],
        )

    def check(self) -> None:
        """Decode every image and mask to its end; DataError of the first that is damaged, no mask, or of another
        size than its image."""
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(self.with_transform(None).__getitem__, range(len(self))):
                pass


def _other_size(path: Path, mask: np.ndarray, image: Image.Image) -> str:
    return (
        f"the mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels and its image {image.width} x {image.height}; "
        "expected the same size"
    )


@dataclass(frozen=True, eq=False)
class MaskData:
    """Images with masks in splits; `val` and `test` are None where there is none."""

    name: str
    train: MaskSplit
    val: MaskSplit | None = None
    test: MaskSplit | None = None

    @property
    def splits(self) -> dict[str, MaskSplit]:
        """The splits that exist, by name."""
        pairs = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in pairs.items() if split is not None}

    def summary(self) -> str:
        """One line: images per split."""
        return f"{self.name}: {', '.join(f'{len(split)} {name}' for name, split in self.splits.items())} images"

    def check(self, *, decode: bool = True) -> None:
        """Raise a DataError for the first mistake found: a split without images, a test image that is also trained
        or validated on (the same bytes), and with `decode` whatever `MaskSplit.check` finds."""
        for name, split in self.splits.items():
            if not len(split):
                raise DataError(f"{self.name}: the {name} split has no images")
        self.check_leaks()
        if decode:
            for split in self.splits.values():
                split.check()

    def check_leaks(self) -> None:
        """DataError where the content of a test image is also that of a training or validation image."""
        entries = {
            key: [Entry(name, path, None) for name, path in zip(split.names, split.images, strict=True)]
            for key, split in self.splits.items()
        }
        found = leaks(Inventory(splits=entries), lambda what, done, total: None)
        if found:
            rest = f"; so are {len(found) - 1} more" if len(found) > 1 else ""
            raise DataError(f"{self.name}: {found[0]}{rest}; take it out of one of the two")
