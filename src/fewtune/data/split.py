"""A labelled set of images: the records, how one is read, and what is done to it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fewtune.data.images import open_image, verify_image
from fewtune.data.leaks import leaks
from fewtune.data.listing import Item, Listing
from fewtune.errors import DataError
from fewtune.progress import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split(Dataset):
    """A torch data set of (image, label), where `image` is a PIL RGB image, or what `transform` makes of one.

    `records[i]` is whatever `read` turns into a PIL image: a path, an array, a member of an archive.
    """

    records: Sequence[Any]
    labels: list[Any]
    """The class of each image; a tuple of its classes, in rising order, where it may have any number of them."""
    names: list[str]
    """What messages call each image: its path relative to the data set's folder, mostly."""
    read: Callable[[Any], Image.Image] = open_image
    transform: Callable[..., Any] | None = None
    multi_label: int | None = None
    """The number of classes, where an image may have any number of them: its label is then a float vector of 0 and 1,
    [classes]."""

    def __post_init__(self) -> None:
        assert len(self.records) == len(self.labels) == len(self.names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.label(index)

    def label(self, index: int) -> Any:
        """The label as training takes it: the class; a vector of 0 and 1 where there may be any number of classes."""
        label = self.labels[index]
        return label if self.multi_label is None else multi_hot(label, self.multi_label)

    def image(self, index: int) -> Image.Image:
        """The image as a PIL RGB image, not transformed."""
        return self.read(self.records[index])

    def file(self, index: int) -> Path | None:
        """The image's file; None where it lies in a table or an archive."""
        record = self.records[index]
        return Path(record) if isinstance(record, str | Path) else None

    @property
    def blocks(self) -> list[Hashable] | None:
        """Of each image, with which others it is read at once; None where each is read by itself."""
        block = getattr(self.read, "block", None)
        return None if block is None else [block(record) for record in self.records]

    def with_transform(self, transform: Callable[..., Any] | None) -> Self:
        """The same images under another transform."""
        return replace(self, transform=transform)

    def subset(self, indices: Iterable[int]) -> Self:
        """The images at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            records=[self.records[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            names=[self.names[i] for i in chosen],
        )

    def joined(self, other: Self) -> Self:
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
    ) -> Self:
        """The same split with its images decoded once and kept in memory as 8-bit arrays.

        Args:
            size: pixels. With `square`, images become size x size, so that the "plain" transform at that size gives
                the very same tensors as from the files. Else the shorter side becomes `size` and the aspect stays;
                images that are smaller are kept as they are: crops are then taken from these smaller images.
            interpolation: "bicubic" or another of Pillow's, in small letters.
        """
        resample = Image.Resampling[interpolation.upper()]

        def shrunk(index: int) -> np.ndarray:
            image = self.image(index)
            if square:
                return np.asarray(image.resize((size, size), resample))
            scale = min(1.0, size / min(image.size))
            target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            return np.asarray(image.resize(target, resample) if scale < 1 else image)

        with ThreadPoolExecutor() as pool:
            arrays = list(shown(pool.map(shrunk, range(len(self))), "decoding images", len(self)))
        return replace(self, records=arrays, read=Image.fromarray)

    def renumbered(self, numbers: Sequence[int], classes: int) -> Self:
        """The same images with label i called `numbers[i]`, of so many classes."""
        if self.multi_label is None:
            return replace(self, labels=[numbers[label] for label in self.labels])
        labels = [tuple(sorted(numbers[label] for label in held)) for held in self.labels]
        return replace(self, labels=labels, multi_label=classes)

    def counts(self, num_classes: int) -> list[int]:
        """How many images each class has."""
        counted = Counter(label for labels in self.labels for label in _each(labels))
        return [counted[label] for label in range(num_classes)]

    def strata(self) -> list[int]:
        """One class for each image, by which draws are balanced: its own; of several the rarest; of none -1."""
        if self.multi_label is None:
            return self.labels
        counts = self.counts(self.multi_label)
        return [min(labels, key=lambda label: (counts[label], label), default=-1) for labels in self.labels]

    def items(self) -> list[Item]:
        """The images that are files or pixels, as a listing has them."""
        return [
            Item(name, Path(record) if isinstance(record, str) else record, label)
            for name, record, label in zip(self.names, self.records, self.labels, strict=True)
            if isinstance(record, str | Path | np.ndarray)
        ]


def multi_hot(labels: Iterable[int], classes: int) -> Tensor:
    """1 at the classes of an image and 0 elsewhere, float [classes]."""
    vector = torch.zeros(classes)
    vector[list(labels)] = 1
    return vector


def _each(label: int | tuple[int, ...]) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else (label,)


def _read_by(record: tuple[Callable[[Any], Image.Image], Any]) -> Image.Image:
    """The image of a record that says how it is read."""
    read, inner = record
    return read(inner)


S = TypeVar("S", bound=Split)


@dataclass(frozen=True, eq=False)
class DataSet(Generic[S]):
    """A data set with its splits; `val` and `test` are None where there is none."""

    name: str
    class_names: tuple[str, ...]
    train: S
    val: S | None = None
    test: S | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, S]:
        """The splits that exist, by name."""
        pairs = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in pairs.items() if split is not None}


@dataclass(frozen=True, eq=False)
class ImageData(DataSet[Split]):
    """Images of classes."""

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of the classes."""
        return self.train.multi_label is not None

    def require_one_class(self) -> None:
        """DataError where images may have several classes, which cross-entropy and accuracy cannot take."""
        if self.multi_label:
            raise DataError(
                f"{self.name}: its images may have several classes (a label such as a;b, or a column called labels): "
                "add task=multi-label; a task of one class an image cannot be trained or scored on it"
            )

    def require_several_classes(self) -> None:
        """DataError where every image has one class."""
        if not self.multi_label:
            raise DataError(
                f"{self.name}: each of its images has one class: leave task=multi-label out; images of any number of "
                "classes are listed in a CSV file with the columns path and labels, the classes parted by ;"
            )

    def summary(self) -> str:
        """One line: classes and images per split."""
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        return f"{self.name}: {self.num_classes} classes; images: {sizes}"

    def check(self, *, decode: bool = True) -> None:
        """Raise a DataError for the first mistake: no images, one class, a label out of range, a file that is
        missing; with `decode`, also an image that cannot be decoded to its end (reads every file once).

        Warned of are classes without a training image, which some published lists have, and with `decode` test images
        that are also training or validation images.
        """
        self._check_labels()
        files = [path for split in self.splits.values() for path in split.records if isinstance(path, str | Path)]
        for path in files:
            if not Path(path).is_file():
                raise DataError(f"{self.name}: the image {path} is listed and does not exist")
        if decode:
            with ThreadPoolExecutor() as pool:
                for _ in shown(pool.map(verify_image, files), "opening images", len(files)):
                    pass
            self._warn_of_leaks()

    def _warn_of_leaks(self) -> None:
        twins = leaks({name: split.items() for name, split in self.splits.items()})
        if twins and self.test is not None:
            labels = sum(twin.item.label != twin.other.label for twin in twins)
            logger.warning(
                "%s: %d of %d test images are also trained or validated on%s, such as %s and %s: the test counts "
                "them; take them out of one of the two (`fewtune data check` lists them)",
                self.name, len(twins), len(self.test), f" ({labels} of them under another label)" if labels else "",
                twins[0].item.name, twins[0].other.name,
            )  # fmt: skip

    def _check_labels(self) -> None:
        for name, split in self.splits.items():
            if len(split) == 0:
                raise DataError(f"{self.name}: the {name} split has no images")
            for i, labels in enumerate(split.labels):
                for label in _each(labels):
                    if not 0 <= label < self.num_classes:
                        raise DataError(
                            f"{self.name}: {split.names[i]} of the {name} split has the label {label}, out of range: "
                            f"with {self.num_classes} classes it must lie in 0..{self.num_classes - 1}"
                        )
        present = {label for labels in self.train.labels for label in _each(labels)}
        if self.multi_label and not present:
            raise DataError(f"{self.name}: no training image has any class")
        if len(present) < 2 and not self.multi_label:
            only = self.class_names[next(iter(present))]
            raise DataError(
                f'{self.name}: all {len(self.train)} training images have one class, "{only}"; '
                "a classification task needs at least two"
            )
        absent = [self.class_names[i] for i in range(self.num_classes) if i not in present]
        if absent:
            logger.warning("%s: no training image has the class %s", self.name, ", ".join(absent[:5]))


def image_data(listing: Listing) -> ImageData:
    """The data set that a listing describes.

    Raises:
        DataError: the listing's first fault.
    """
    refuse(listing)
    classes = len(listing.class_names) if listing.multi_label else None
    splits = {name: split_of(items, classes) for name, items in listing.splits.items()}
    return ImageData(listing.name, listing.class_names, **splits)


def split_of(items: Sequence[Item], multi_label: int | None = None) -> Split:
    """The images of a listing, from their files or from memory."""
    pixels = bool(items) and isinstance(items[0].content, np.ndarray)
    return Split(
        records=[item.content for item in items],
        labels=[item.label for item in items],
        names=[item.name for item in items],
        read=_picture if pixels else open_image,
        multi_label=multi_label,
    )


def refuse(listing: Listing) -> None:
    """Raise a listing's first fault as DataError; warn of what its notes say."""
    if listing.faults:
        raise DataError(listing.faults[0])
    for note in listing.notes:
        logger.warning("%s", note)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))
