"""Finding images that lie in two parts of a data set, or under two labels, by their content."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewtune.data.listing import Item
from fewtune.progress import shown

HEAD = 4096


class Twin(NamedTuple):
    """An image that is the same as one before it, byte for byte; `split` is that of the first named."""

    item: Item
    split: str
    other: Item
    other_split: str

    def __str__(self) -> str:
        """The fault in words."""
        fate = "trained or validated on" if self.split == "test" else f"a {self.other_split} image under another label"
        return f"{self.item.name} ({self.split}) is the same image as {self.other.name}, which is {fate}"


def leaks(splits: Mapping[str, Sequence[Item]]) -> list[Twin]:
    """Test images whose content is also that of a training or validation image, under whatever label.

    An image that was encoded anew is not recognised.
    """
    others = [(name, item) for name in ("train", "val") for item in splits.get(name, ())]
    return _twins(others, [("test", item) for item in splits.get("test", ())])


def contradictions(splits: Mapping[str, Sequence[Item]]) -> list[Twin]:
    """Training and validation images that also have another label, in the same part or the other."""
    items = [(name, item) for name in ("train", "val") for item in splits.get(name, ())]
    return [twin for twin in _twins(items, items) if twin.item.label != twin.other.label]


def repeats(items: Sequence[Item]) -> list[Twin]:
    """Images that occur more than once in one part: a part of it that is drawn at random would share them."""
    named = [("train", item) for item in items]
    return _twins(named, named)


Named = Sequence[tuple[str, Item]]
"""(split, image)"""


def _twins(known: Named, asked: Named) -> list[Twin]:
    """The images of `asked` that have the content of an earlier or other one in `known`; the first such is named."""
    if not known or not asked:
        return []
    alike: dict[Any, list[tuple[str, Item]]] = defaultdict(list)
    for pair, key in _keyed(known):
        alike[key].append(pair)
    if known is asked:
        suspects = [(pair, pairs[:i]) for pairs in alike.values() for i, pair in enumerate(pairs) if i]
    else:
        suspects = [(pair, alike[key]) for pair, key in _keyed(asked) if key in alike]
    digests: dict[str, bytes] = {}

    def digest(split: str, item: Item) -> bytes:
        key = f"{split}/{item.name}"
        if key not in digests:
            digests[key] = content_digest(item.content)
        return digests[key]

    twins = []
    for (split, item), near in suspects:
        twin = next((pair for pair in near if digest(*pair) == digest(split, item)), None)
        if twin is not None:
            twins.append(Twin(item, split, twin[1], twin[0]))
    return twins


def _keyed(pairs: Named) -> Iterator[tuple[tuple[str, Item], Any]]:
    with ThreadPoolExecutor() as pool:
        keys = in_turn(pool, _rough, [item for _, item in pairs])
        for pair, key in shown(zip(pairs, keys, strict=True), "comparing images", len(pairs)):
            if key is not None:
                yield pair, key


def in_turn(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """`pool.map` that does not queue millions of calls at once."""
    step = 4096
    for start in range(0, len(items), step):
        yield from pool.map(function, items[start : start + step])


def _rough(item: Item) -> tuple[int, bytes] | None:
    """Size and first bytes: files that differ here differ, so few files are read whole. None: no such file."""
    if isinstance(item.content, np.ndarray):
        return item.content.nbytes, hashlib.blake2b(item.content.tobytes(), digest_size=16).digest()
    try:
        with item.content.open("rb") as file:
            return item.content.stat().st_size, hashlib.blake2b(file.read(HEAD), digest_size=16).digest()
    except OSError:
        return None


def content_digest(content: Path | np.ndarray) -> bytes:
    """The SHA-256 of a file's bytes, or of pixels."""
    return hashlib.sha256(content.tobytes() if isinstance(content, np.ndarray) else content.read_bytes()).digest()
