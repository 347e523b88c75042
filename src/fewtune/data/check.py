"""Whether a data set on disk is whole, and is what was published: `fewtune data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fewtune.data.catalog import Declaration, find_folder
from fewtune.data.formats import format_of
from fewtune.data.images import open_image, verify_image
from fewtune.data.leaks import contradictions, in_turn, leaks, repeats
from fewtune.data.listing import Expected, Item, Listing
from fewtune.errors import DataError
from fewtune.progress import shown


@dataclass(frozen=True)
class Checked:
    """The folder, images of each split, classes, images opened, and one line for every fault."""

    folder: Path
    counts: dict[str, int]
    classes: int
    opened: int
    faults: tuple[str, ...]


def check(
    data_set: Declaration,
    root: str | Path,
    *,
    sample: int | None = None,
    duplicates: bool = True,
) -> Checked:
    """Compare a data set's folder with its declaration.

    Looked at are the lists and folders, labels, numbers of classes and images, files that are listed and missing,
    images that cannot be decoded to their end, and test images that are also training or validation images (the same
    bytes; an image that was encoded anew is not recognised).

    Args:
        data_set: what is expected; `Declaration.part` where only a part of it is at hand.
        root: the folder that holds the data set's folder, or that folder.
        sample: open only so many images of each split (drawn, always the same); None opens all.
        duplicates: look for test images among the others.

    Raises:
        DataError: there is no such folder.
    """
    folder = find_folder(data_set, root)
    listing = data_set.listing(folder)
    more = [*listing.gaps, *_missing(listing), *_counts(data_set, listing)]
    return _checked(listing, folder, more, sample, _leaks(listing) if duplicates else [])


def check_path(path: str | Path, *, sample: int | None = None, duplicates: bool = True) -> Checked:
    """Check a folder or CSV file of a user's own; arguments as `check`'s.

    Beside test images that are also trained on, images with two labels are told, and in a folder without a test part
    images that occur more than once: a test part that is drawn from it would share them with the training images.

    Raises:
        DataError: there is no such path, or no format that fits it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist")
    listing = format_of(path).list(path, Expected())
    faults = [*_missing(listing), *_repeated(listing)]
    twins: list[str] = []
    if duplicates and listing.splits:
        twins = [*_leaks(listing), *map(str, contradictions(listing.splits))]
        if set(listing.splits) == {"train"}:
            twins += [
                f"{twin.item.name} is the same image as {twin.other.name}; keep one of them, or divide train and test "
                "yourself"
                for twin in repeats(listing.splits["train"])
                if twin.item.label == twin.other.label
            ]
    return _checked(listing, path if path.is_dir() else path.parent, faults, sample, twins)


def _leaks(listing: Listing) -> list[str]:
    return [
        str(twin) + (" under another label" if twin.item.label != twin.other.label else "")
        for twin in leaks(listing.splits)
    ]


def _checked(listing: Listing, folder: Path, more: list[str], sample: int | None, twins: list[str]) -> Checked:
    """Open the images, and put all faults together, each on one line and without the folder's path."""
    chosen = list(_sampled(listing, sample))
    faults = [*listing.faults, *more, *_unreadable(chosen), *twins]
    counts = {split: len(items) for split, items in listing.splits.items()}
    lines = tuple(" ".join(fault.replace(f"{folder}/", "").split()) for fault in faults)
    return Checked(folder, counts, len(listing.class_names), len(chosen), lines)


def _missing(listing: Listing) -> Iterator[str]:
    for split, items in listing.splits.items():
        for item in items:
            if isinstance(item.content, Path) and not item.content.is_file():
                yield f"{item.name} ({split}) is listed and does not exist"


def _counts(data_set: Declaration, listing: Listing) -> Iterator[str]:
    if len(listing.class_names) != data_set.classes:
        yield f"{len(listing.class_names):,} classes, {data_set.classes:,} expected"
    for split, expected in data_set.counts._asdict().items():
        number = len(listing.splits.get(split, ()))
        if number != (expected or 0):
            yield f"{split}: {number:,} images, {expected or 0:,} expected"
    yield from _repeated(listing)


def _repeated(listing: Listing) -> Iterator[str]:
    for split, items in listing.splits.items():
        for name, times in Counter(item.name for item in items).items():
            if times > 1:
                yield f"{name} is listed {times} times in {split}"


def _sampled(listing: Listing, sample: int | None) -> Iterator[Item]:
    """Images to open whose files exist."""
    for items in listing.splits.values():
        there = [item for item in items if isinstance(item.content, np.ndarray) or item.content.is_file()]
        if sample is not None and sample < len(there):
            there = [there[i] for i in sorted(np.random.default_rng(0).permutation(len(there))[:sample])]
        yield from there


def _unreadable(items: list[Item]) -> list[str]:
    """Decode every file to its end, in threads; a mask must have its image's size."""
    with ThreadPoolExecutor() as pool:
        faults = shown(in_turn(pool, _fault, items), "opening images", len(items))
        return [fault for fault in faults if fault]


def _fault(item: Item) -> str | None:
    if isinstance(item.content, np.ndarray):
        return None
    try:
        verify_image(item.content)
        if item.mask is None:
            return None
        with Image.open(item.content) as image:
            size = image.size
        mask = open_image(item.mask).size
    except DataError as error:
        return str(error)
    if mask != size:
        return f"{item.mask} has {mask[0]} x {mask[1]} pixels, its image {size[0]} x {size[1]}"
    return None
