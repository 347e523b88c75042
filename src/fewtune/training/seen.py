"""Which images a task was trained on, as its file records them, and on which images it may be scored.

A file holds the first 8 bytes of the SHA-256 of every image that was trained on or that chose something (validation):
of the file's bytes, or of the decoded pixels where there is no file. A renamed copy has the same digest. A copy that
was encoded anew has not, so of at most `LOOKED_AT` images a perceptual hash is kept too, which can only warn.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fewtune.data.split import DataSet, Split
from fewtune.errors import DataError, Progress
from fewtune.files import Json
from fewtune.progress import shown
from fewtune.training.images import Listed

DIGEST = 8
"""Bytes of a digest."""
LOOKED_AT = 2000
"""Of more images no perceptual hash is taken: each has to be decoded for it."""
ALIKE = 4
"""So many of the 64 bits of two perceptual hashes may differ in copies of one image."""
SETTINGS = ("seed", "val_fraction", "test_fraction", "limit_train", "limit_test", "shots")
"""The recipe's keys that tell how data is split."""


P = TypeVar("P", bound=Split)


def content_digests(images: Listed) -> list[bytes]:
    """The digest of every image."""

    def digest(index: int) -> bytes:
        file = images.file(index)
        if file is not None:
            return hashlib.sha256(file.read_bytes()).digest()[:DIGEST]
        pixels = np.asarray(images.image(index))
        return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()[:DIGEST]

    with ThreadPoolExecutor() as pool:
        return list(shown(pool.map(digest, range(len(images))), "digests of images", len(images)))


def _looks(images: Listed) -> np.ndarray:
    """The perceptual hash (DCT) of every image, uint64 [N]."""
    import imagehash

    def look(index: int) -> int:
        return int(np.packbits(imagehash.phash(images.image(index)).hash).view(">u8")[0])

    with ThreadPoolExecutor() as pool:
        looks = shown(pool.map(look, range(len(images))), "perceptual hashes of images", len(images))
        return np.fromiter(looks, dtype=np.uint64, count=len(images))


def record(parts: Iterable[Listed | None]) -> Json:
    """What a task file keeps of the images of `parts`: able to go into JSON, the same for any order of the images."""
    present = [part for part in parts if part is not None]
    digests = sorted({digest for part in present for digest in content_digests(part)})
    record: Json = {"images": sum(map(len, present)), "sha256": base64.b64encode(b"".join(digests)).decode()}
    if record["images"] <= LOOKED_AT:
        looks = np.unique(np.concatenate([_looks(part) for part in present])).astype(">u8")
        record["phash"] = base64.b64encode(looks.tobytes()).decode()
    return record


@dataclass(frozen=True)
class Seen:
    """The images of a task file's record; `looks` is None where there were too many."""

    digests: frozenset[bytes]
    looks: np.ndarray | None

    @classmethod
    def of(cls, metadata: Mapping[str, object]) -> Seen | None:
        """The record of a task file; None in files of versions that kept none."""
        record = metadata.get("seen")
        if not isinstance(record, dict) or "sha256" not in record:
            return None
        content = base64.b64decode(record["sha256"])
        digests = frozenset(content[start : start + DIGEST] for start in range(0, len(content), DIGEST))
        looks = record.get("phash")
        return cls(digests, None if looks is None else np.frombuffer(base64.b64decode(looks), ">u8").astype(np.uint64))

    def among(self, images: Listed) -> np.ndarray:
        """Which of the images were seen, bool [N]."""
        return np.array([digest in self.digests for digest in content_digests(images)], dtype=bool)

    def alike(self, images: Listed) -> list[str]:
        """Names of images that look like one that was seen; none where nothing is known of looks."""
        if self.looks is None or len(images) > LOOKED_AT:
            return []
        return [
            name
            for name, look in zip(images.names, _looks(images), strict=True)
            if (_different_bits(self.looks, look) <= ALIKE).any()
        ]


def _different_bits(looks: np.ndarray, look: np.uint64) -> np.ndarray:
    bits: np.ndarray = np.unpackbits((looks ^ look).view(np.uint8)).reshape(len(looks), 64)
    return np.asarray(bits.sum(axis=1))


@dataclass(frozen=True)
class Chosen(Generic[P]):
    """What is scored.

    fresh: images that the task has not seen; None where there are none.
    trained: those that it has seen, where they were asked for.
    told: how the images were chosen, as JSON; empty where there is nothing to tell.
    """

    fresh: P | None
    trained: P | None
    told: Json


def chosen(
    load: Callable[..., DataSet[P]],
    data: str,
    part: str,
    metadata: Json,
    limited: Callable[[P, int], P],
    *,
    include_training: bool = False,
    progress: Progress | None = None,
    **options: object,
) -> Chosen[P]:
    """The images of a part of some data that a task is scored on.

    Data without a test part is split again as the task file records, where that gives the very images that the task
    has seen; else all of it counts as "test". Images that the task has seen are left out.

    Args:
        load: (data, **options) -> splits: `load_data` or `load_masks`.
        part: test, val, train or all.
        metadata: of the task file; empty for a model without one.
        limited: so many images of a split, as `load` would take them for the test.
        include_training: give images that were seen too, apart.
        options: of `load`; None is left out.

    Raises:
        DataError: there is no such part, or nothing is left of it.
    """
    say = progress or (lambda text: None)
    given = {key: value for key, value in options.items() if value is not None}
    seen = Seen.of(metadata)
    whole = load(data, **{"val_fraction": 0.0, **given})
    again = None
    if whole.test is None and not {"test_fraction", "val_fraction"} & given.keys():
        again = _split_again(load, data, metadata, seen, given)
    pool = _part(again or whole, part, whole)
    told: dict[str, Any] = {}
    if again is not None:
        told["split_again"] = _recorded(metadata)
        settings = ", ".join(f"{key}={value}" for key, value in told["split_again"].items())
        say(f"{whole.name}: split as for training ({settings}); scored is the {part} part, {len(pool)} images")
    if seen is None:
        if metadata:
            told["training_images_known"] = False
            say("this task file holds no list of the images that it was trained on, so some may be among these")
        return Chosen(_cut(pool, whole, given, limited), None, told)
    known = seen.among(pool)
    fresh = pool.subset(np.flatnonzero(~known))
    if known.any() and not include_training:
        told["left_out"] = int(known.sum())
        if not len(fresh):
            raise DataError(
                f"all {len(pool)} images of the {part} part of {whole.name} were trained on or chose the epoch, so "
                "their score says nothing of new images: give others, or fit with test_fraction=0.2; "
                "--include-training scores them apart"
            )
        say(f"{known.sum()} images were trained on or chose the epoch and are left out (--include-training)")
    scored = _cut(fresh, whole, given, limited) if len(fresh) else None
    if scored is not None and (alike := seen.alike(scored)):
        told["alike"] = alike
        say(f"warning: {len(alike)} images look like copies of images that were trained on: {', '.join(alike[:5])}")
    trained = None
    if include_training:
        everything = whole.train if again is not None and part == "test" else pool
        trained = everything.subset(np.flatnonzero(seen.among(everything)))
    return Chosen(scored, trained if trained is not None and len(trained) else None, told)


def _part(data: DataSet[P], part: str, whole: DataSet[P]) -> P:
    if part in data.splits:
        return data.splits[part]
    if whole.val is None and whole.test is None and part in ("test", "all"):
        return whole.train
    raise DataError(f"{data.name} has no {part} split; it has {', '.join(data.splits)}")


def _cut(images: P, whole: DataSet[P], given: Mapping[str, Any], limited: Callable[[P, int], P]) -> P:
    """At most `limit_test` images of data that has no test part of its own."""
    limit = given.get("limit_test")
    return images if limit is None or whole.test is not None or limit >= len(images) else limited(images, limit)


def _recorded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    recipe = metadata.get("recipe") or {}
    return {key: recipe[key] for key in SETTINGS if recipe.get(key) is not None}


def _split_again(
    load: Callable[..., DataSet[P]], data: str, metadata: Json, seen: Seen | None, given: Mapping[str, Any]
) -> DataSet[P] | None:
    """The data split as for training; None where it is other data, or no test part was split off."""
    settings = _recorded(metadata)
    if "test_fraction" not in settings:
        return None
    try:
        split = load(data, **{**settings, **given})
    except DataError:  # too few images, or other classes: this is other data
        return None
    if seen is None:
        same = Path(data).resolve() == Path(metadata["recipe"].get("data", "")).resolve()
    else:
        parts = [part for part in (split.train, split.val) if part is not None]
        same = seen.digests == {digest for part in parts for digest in content_digests(part)}
    return split if same else None
