"""A labelled set of images: the records, how one is read, and what is done to it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fewtune.data.images import open_image, verify_image
from fewtune.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (done, all) as slow work goes on."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split(Dataset):
    """A torch data set of (image, label), where `image` is a PIL RGB image, or what `transform` makes of one.

    `records[i]` is whatever `read` turns into a PIL image: a path, an array, a member of an archive.
    """

    records: Sequence[Any]
    labels: list[int]
    names: list[str]
    """What messages call each image: its path relative to the data set's folder, mostly."""
    read: Callable[[Any], Image.Image] = open_image
    transform: Callable[[Image.Image], Any] | None = None

    def __post_init__(self) -> None:
        assert len(self.records) == len(self.labels) == len(self.names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.labels[index]

    def image(self, index: int) -> Image.Image:
        """The image as a PIL RGB image, not transformed."""
        return self.read(self.records[index])

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> Split:
        """The same images under another transform."""
        return replace(self, transform=transform)

    def subset(self, indices: Iterable[int]) -> Split:
        """The images at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            records=[self.records[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            names=[self.names[i] for i in chosen],
        )

    def joined(self, other: Split) -> Split:
        """These images, then those of another split of the same data set."""
        records, read = [*self.records, *other.records], self.read
        if self.read != other.read:  # each split has its own table of images
            records = [(split.read, record) for split in (self, other) for record in split.records]
            read = _read_by
        labels, names = [*self.labels, *other.labels], [*self.names, *other.names]
        return replace(self, records=records, labels=labels, names=names, read=read)

    def cached(
        self,
        size: int,
        *,
        square: bool = False,
        interpolation: str = "bicubic",
        progress: Progress | None = None,
    ) -> Split:
        """The same split with its images decoded once and kept in memory as 8-bit arrays.

        Args:
            size: pixels. With `square`, images become size x size, so that the "plain" transform at that size gives
                the very same tensors as from the files. Else the shorter side becomes `size` and the aspect stays;
                images that are smaller are kept as they are: crops are then taken from these smaller images.
            interpolation: "bicubic" or another of Pillow's, in small letters.
            progress: called with (done, all).
        """
        resample = Image.Resampling[interpolation.upper()]

        def shrunk(index: int) -> np.ndarray:
            image = self.image(index)
            if square:
                return np.asarray(image.resize((size, size), resample))
            scale = min(1.0, size / min(image.size))
            target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            return np.asarray(image.resize(target, resample) if scale < 1 else image)

        arrays = []
        with ThreadPoolExecutor() as pool:
            for done, array in enumerate(pool.map(shrunk, range(len(self))), 1):
                arrays.append(array)
                if progress:
                    progress(done, len(self))
        return replace(self, records=arrays, read=Image.fromarray)

    def counts(self, num_classes: int) -> list[int]:
        """How many images each class has."""
        found = Counter(self.labels)
        return [found[label] for label in range(num_classes)]


def _read_by(record: tuple[Callable[[Any], Image.Image], Any]) -> Image.Image:
    """The image of a record that says how it is read."""
    read, own = record
    return read(own)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set with its splits; `val` and `test` are None where there is none."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that exist, by name."""
        pairs = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in pairs.items() if split is not None}

    def summary(self) -> str:
        """One line: classes and images per split."""
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        return f"{self.name}: {self.num_classes} classes; images: {sizes}"

    def check(self, *, decode: bool = True, progress: Progress | None = None) -> None:
        """Raise a DataError for the first mistake found: no images, one class, a label out of range, a file that is
        missing; with `decode`, also an image that cannot be decoded to its end (reads every file once).

        Classes without a training image are warned of: some published lists have them.
        """
        self._check_labels()
        files = [path for split in self.splits.values() for path in split.records if isinstance(path, str | Path)]
        for path in files:
            if not Path(path).is_file():
                raise DataError(f"{self.name}: the image {path} is listed and does not exist")
        if decode:
            with ThreadPoolExecutor() as pool:
                for done, _ in enumerate(pool.map(verify_image, files), 1):
                    if progress:
                        progress(done, len(files))

    def _check_labels(self) -> None:
        for name, split in self.splits.items():
            if len(split) == 0:
                raise DataError(f"{self.name}: the {name} split has no images")
            for i, label in enumerate(split.labels):
                if not 0 <= label < self.num_classes:
                    raise DataError(
                        f"{self.name}: {split.names[i]} of the {name} split has the label {label}, out of range: "
                        f"with {self.num_classes} classes it must lie in 0..{self.num_classes - 1}"
                    )
        present = set(self.train.labels)
        if len(present) < 2:
            only = self.class_names[next(iter(present))]
            raise DataError(
                f'{self.name}: all {len(self.train)} training images have one class, "{only}"; '
                "a classification task needs at least two"
            )
        absent = [self.class_names[i] for i in range(self.num_classes) if i not in present]
        if absent:
            logger.warning("%s: no training image has the class %s", self.name, ", ".join(absent[:5]))
