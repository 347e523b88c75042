"""The listing of a data set: its images and labels, before an image is opened.

A format makes a listing and raises nothing: loading stops at the first fault of a listing, checking reports them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewtune.data.images import SUFFIXES

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What people call the parts of a data set, in small letters, and what they are called here."""

Label = int | tuple[int, ...]
"""An image's class, or its classes, in rising order, where it may have any number of them."""
UNKNOWN = -1
"""The class of an image whose label is a fault."""

Listed = list[tuple[str, Any]]
"""(path as listed, label as listed)"""


class Counts(NamedTuple):
    """Images of each split; None where there is no such split."""

    train: int | None = None
    val: int | None = None
    test: int | None = None


class Expected(NamedTuple):
    """What is known of a data set beforehand: its number of classes, and its images; None where nothing is."""

    classes: int | None = None
    counts: Counts | None = None


class Item(NamedTuple):
    """One image of a listing."""

    name: str
    """What messages call it: its path relative to the data set's folder."""
    content: Path | np.ndarray
    """Its file, or its pixels where many images share a file."""
    label: Label = UNKNOWN
    mask: Path | None = None


@dataclass
class Listing:
    """The images of each split and the names of the classes, with all that is wrong, one line each."""

    name: str
    class_names: tuple[str, ...] = ()
    splits: dict[str, list[Item]] = field(default_factory=dict)
    multi_label: bool = False
    """Whether an image may have any number of the classes."""
    faults: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    """What a published data set has and this one lacks; it can be loaded all the same."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of a folder of their own."""


@dataclass(frozen=True)
class Format:
    """A way in which labelled images lie on disk.

    Others' are tried first: an installed package offers one by the entry point `fewtune.formats`.
    """

    name: str
    layout: str
    """What must lie in the folder, in words."""
    recognise: Callable[[Path], bool]
    """Whether a file or folder has the marks of the format."""
    list: Callable[[Path, Expected], Listing]
    """What a file or folder of the format holds; opens no image, and raises nothing for what is wrong with it."""


def listed_items(
    entries: Listed, roots: Sequence[Path], number: Callable[[Any], Label], faults: list[str]
) -> list[Item]:
    """Listed images in the order of their paths, below the first root that has any of them."""
    entries = sorted(entries, key=lambda entry: entry[0])
    root = next((root for root in roots if any((root / name).is_file() for name, _ in entries)), roots[0])
    strange = next((name for name, _ in entries if Path(name).suffix.lower() not in SUFFIXES), None)
    if strange is not None:
        faults.append(f"{strange} is listed and is not an image ({', '.join(sorted(SUFFIXES))})")
    return [Item(name, root / name, number(label)) for name, label in entries]


def numbered(listing: Listing, listed: dict[str, Listed], roots: Sequence[Path], where: Callable[[str], str]) -> None:
    """Fill a listing whose labels are words or numbers of any kind: the classes are those of the training images.

    Args:
        listing: gets class names, splits and faults.
        listed: the lists by split.
        roots: where images may lie.
        where: split -> what a message calls its list.
    """
    classes = in_label_order({label for _, label in listed["train"]})
    number = {label: i for i, label in enumerate(classes)}
    listing.class_names = tuple(map(str, classes))
    for split, entries in listed.items():
        listing.faults += [
            f'{where(split)}: {name} has the label "{label}", which no training image has (off range)'
            for name, label in entries
            if label not in number
        ]
        listing.splits[split] = listed_items(entries, roots, lambda label: number.get(label, UNKNOWN), listing.faults)


def in_label_order(labels: Iterable[Any]) -> list[Any]:
    """Whole numbers by value, anything else by its letters."""
    known = list(labels)
    if all(str(label).lstrip("-").isdigit() for label in known):
        return sorted(known, key=int)
    return sorted(known, key=str)


def read_list(path: Path, missing: str, faults: list[str]) -> str | None:
    """The text of a list; None, and a fault that says `missing`, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        faults.append(missing)
    except UnicodeDecodeError:
        faults.append(f"{path} is no text in UTF-8")
    return None
