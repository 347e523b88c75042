"""Whether a data set on disk is whole and is what was published: `fewtune data check`."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewtune.data.catalog import Declaration
from fewtune.data.declared import find_folder
from fewtune.data.images import open_image, verify_image
from fewtune.data.inventory import Entry, Inventory, inventory
from fewtune.errors import DataError

HEAD = 4096
Progress = Callable[[str, int, int], None]
"""Called with (what is done, how many are done, all)."""


@dataclass(frozen=True)
class Checked:
    """What was found: the folder, images of each split, classes, images opened, and one line for every fault."""

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
    progress: Progress | None = None,
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
        progress: told how the slow parts go on.

    Raises:
        DataError: there is no such folder.
    """
    folder = find_folder(data_set, root)
    found = inventory(data_set, folder)
    told = progress or (lambda what, done, total: None)
    faults = [*found.faults, *_missing(found, folder), *_counts(data_set, found)]
    chosen = list(_sampled(found, sample))
    faults += _unreadable(chosen, folder, told)
    if duplicates:
        faults += leaks(found, told)
    counts = {split: len(entries) for split, entries in found.splits.items()}
    return Checked(folder, counts, found.classes, len(chosen), tuple(" ".join(fault.split()) for fault in faults))


def _missing(found: Inventory, folder: Path) -> Iterator[str]:
    for split, entries in found.splits.items():
        for entry in entries:
            if isinstance(entry.content, Path) and not entry.content.is_file():
                yield f"{entry.name} ({split}) is listed and does not exist"


def _counts(data_set: Declaration, found: Inventory) -> Iterator[str]:
    if found.classes != data_set.classes:
        yield f"{found.classes:,} classes, {data_set.classes:,} expected"
    for split, expected in data_set.counts._asdict().items():
        number = len(found.splits.get(split, ()))
        if number != (expected or 0):
            yield f"{split}: {number:,} images, {expected or 0:,} expected"
    for split, entries in found.splits.items():
        for name, times in Counter(entry.name for entry in entries).items():
            if times > 1:
                yield f"{name} is listed {times} times in {split}"


def _sampled(found: Inventory, sample: int | None) -> Iterator[Entry]:
    """Entries to open whose files exist."""
    for entries in found.splits.values():
        there = [entry for entry in entries if isinstance(entry.content, np.ndarray) or entry.content.is_file()]
        if sample is not None and sample < len(there):
            there = [there[i] for i in sorted(np.random.default_rng(0).permutation(len(there))[:sample])]
        yield from there


def _unreadable(entries: list[Entry], folder: Path, told: Progress) -> list[str]:
    """Decode every file to its end, in threads; a mask must have its image's size."""
    faults = []
    with ThreadPoolExecutor() as pool:
        for done, fault in enumerate(_in_turn(pool, lambda entry: _fault(entry, folder), entries), 1):
            if fault:
                faults.append(fault)
            told("opening images", done, len(entries))
    return faults


def _in_turn(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """`pool.map` that does not queue millions of calls at once."""
    step = 4096
    for start in range(0, len(items), step):
        yield from pool.map(function, items[start : start + step])


def _fault(entry: Entry, folder: Path) -> str | None:
    if isinstance(entry.content, np.ndarray):
        return None
    try:
        verify_image(entry.content)
        if entry.mask is None or not entry.mask.is_file():
            return None
        with Image.open(entry.content) as image:
            size = image.size
        mask = open_image(entry.mask).size
    except DataError as error:
        return str(error).replace(f"{folder}/", "")
    if mask != size:
        return f"masks/{entry.mask.name} has {mask[0]} x {mask[1]} pixels, its image {size[0]} x {size[1]}"
    return None


def leaks(found: Inventory, told: Progress) -> list[str]:
    """Test images whose content is also that of a training or validation image."""
    test = found.splits.get("test", [])
    others = [entry for split in ("train", "val") for entry in found.splits.get(split, [])]
    if not test or not others:
        return []
    known: dict[Any, list[Entry]] = defaultdict(list)
    for entry, key in _keyed(others, _rough, told):
        known[key].append(entry)
    suspects = [(entry, known[key]) for entry, key in _keyed(test, _rough, told) if key in known]
    exact = {entry.name: _digest(entry) for _, near in suspects for entry in near}
    faults = []
    for entry, near in suspects:
        own = _digest(entry)
        twin = next((other for other in near if exact[other.name] == own), None)
        if twin is not None:
            faults.append(f"{entry.name} (test) is the same image as {twin.name}, which is trained or validated on")
    return faults


def _keyed(entries: list[Entry], key: Callable[[Entry], Any], told: Progress) -> Iterable[tuple[Entry, Any]]:
    with ThreadPoolExecutor() as pool:
        for done, (entry, value) in enumerate(zip(entries, _in_turn(pool, key, entries), strict=True), 1):
            told("comparing train and test", done, len(entries))
            if value is not None:
                yield entry, value


def _rough(entry: Entry) -> tuple[int, bytes] | None:
    """Size and first bytes: files that differ here differ, so few files are read whole. None: no such file."""
    if isinstance(entry.content, np.ndarray):
        return entry.content.nbytes, hashlib.blake2b(entry.content.tobytes(), digest_size=16).digest()
    try:
        with entry.content.open("rb") as file:
            return entry.content.stat().st_size, hashlib.blake2b(file.read(HEAD), digest_size=16).digest()
    except OSError:
        return None


def _digest(entry: Entry) -> bytes:
    content = entry.content
    return hashlib.sha256(content.tobytes() if isinstance(content, np.ndarray) else content.read_bytes()).digest()
