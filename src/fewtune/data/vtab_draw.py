"""VTAB-1k's lists of 1,000 training images, drawn from the public data sets by the rule that VTAB follows.

VTAB (Zhai et al. 2019) takes its images from TensorFlow Datasets, which orders the records of a split by the MD5 of
the split's name and the record's key. train800 is the first 800 records of the part that VTAB trains on, val200 the
first 200 of the part that it validates on. Keys are those of TensorFlow Datasets' own builders; parts are VTAB's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fewtune.data.formats.vtab import JOINT, LISTS
from fewtune.errors import DataError

TRAIN, VAL, BLOCK = 800, 200, 16
"""Images of the two training lists; the joint list takes the two in turn in blocks of 16."""


class Record(NamedTuple):
    """An image of a public data set."""

    key: str
    """What TensorFlow Datasets calls it within its split."""
    label: int
    name: str
    """The name of its file below images/."""
    content: Any = None
    """Its file, or its pixels [height, width, 3] of 8 bits."""


class Part(NamedTuple):
    """A stretch of the ordered records of a split, from one percentage to another, rounded down."""

    split: str
    start: int = 0
    stop: int = 100


@dataclass(frozen=True)
class Draw:
    """How VTAB-1k divides a public data set.

    archive: the name of torchvision's data set.
    records: how many records each split of it has; with others the draw would be another task.
    train, val, test: VTAB's parts.
    labels: SHA-256 of the labels of the published train800 and val200, joined by commas; None where no list was at
        hand.
    """

    archive: str
    records: Mapping[str, int]
    train: Part
    val: Part
    test: Part
    labels: str | None = None

    @property
    def status(self) -> str:
        """What a reader is to know of the lists."""
        how = f"by `fewtune data prepare`, from torchvision's {self.archive}"
        if self.labels:
            return f"{how}; all {TRAIN + VAL:,} labels are checked against the published lists"
        return f"{how}, by VTAB's rule; unchecked: no published list was at hand"


_THREE = (Part("train"), Part("validation"), Part("test"))
"""The parts where the authors' own division has validation images."""

DRAWS: dict[str, Draw | str] = {
    "cifar": Draw(
        "CIFAR100", {"train": 50_000, "test": 10_000}, Part("train", 0, 90), Part("train", 90), Part("test"),
        "9562aad2adc80f487ea24594b5014fe33524ecf50f400169f117396d9c52b383",
    ),
    "caltech101": "not by rule: TensorFlow Datasets draws its training images in the order of a directory listing",
    "dtd": Draw("DTD", {"train": 1_880, "validation": 1_880, "test": 1_880}, *_THREE),
    "oxford_flowers102": Draw(
        "Flowers102", {"train": 1_020, "validation": 1_020, "test": 6_149}, *_THREE
    ),
    "oxford_iiit_pet": Draw(
        "OxfordIIITPet", {"train": 3_680, "test": 3_669}, Part("train", 0, 80), Part("train", 80), Part("test")
    ),
    "svhn": Draw(
        "SVHN", {"train": 73_257, "test": 26_032}, Part("train", 0, 90), Part("train", 90), Part("test")
    ),
    "sun397": "not by rule: its division is a list within TensorFlow Datasets that the public archive lacks",
    "patch_camelyon": "not built: the rule would hold; torchvision reads its archive with h5py, which no extra brings",
    "eurosat": Draw("EuroSAT", {"train": 27_000}, Part("train", 0, 60), Part("train", 60, 80), Part("train", 80)),
    "resisc45": "not by a program: its archive must be fetched by hand, and torchvision does not read it",
    "diabetic_retinopathy": "not by a program: only those who joined the Kaggle competition may fetch it",
    "clevr_count": "not built: the rule would hold, but labels come from the scenes of an archive of 18 GB",
    "clevr_dist": "not built: the rule would hold, but labels come from the scenes of an archive of 18 GB",
    "dmlab": "not by rule: its frames exist only as records of TensorFlow Datasets",
    "kitti": "not by rule: TensorFlow Datasets divides its videos by a list of its own",
    "dsprites_loc": "not built: torchvision does not read its archive",
    "dsprites_ori": "not built: torchvision does not read its archive",
    "smallnorb_azi": "not built: torchvision does not read its archive",
    "smallnorb_ele": "not built: torchvision does not read its archive",
}  # fmt: skip
"""By the task's folder: how its lists are drawn, or in words why they are not."""


def ordered(split: str, records: Iterable[Record]) -> list[Record]:
    """Records as TensorFlow Datasets orders them: by the MD5 of the split's name and the key, read as a number."""
    return sorted(records, key=lambda record: hashlib.md5(f"{split}{record.key}".encode()).digest())


def drawn(rule: Draw, splits: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """VTAB-1k's four lists, by the names of their files.

    Args:
        rule: of the task.
        splits: all records of the public data set by split, in any order.

    Raises:
        DataError: a split has not the published number of records, or the labels are not those of the published lists.
    """
    for split, expected in rule.records.items():
        if len(splits[split]) != expected:
            raise DataError(
                f"{rule.archive} has {len(splits[split]):,} images in {split}, expected {expected:,}: a draw from it "
                "would not be VTAB-1k; fetch the archive anew"
            )
    order = {split: ordered(split, records) for split, records in splits.items()}
    train, val = _stretch(order, rule.train)[:TRAIN], _stretch(order, rule.val)[:VAL]
    if rule.labels is not None and digest(train + val) != rule.labels:
        raise DataError(f"{rule.archive}: the labels of the draw are not those of VTAB-1k's published lists")
    lists = {"train": train, "val": val, "test": _stretch(order, rule.test)}
    return {LISTS[name]: records for name, records in lists.items()} | {JOINT: in_turns(train, val)}


def digest(records: Iterable[Record]) -> str:
    """SHA-256 of the labels, joined by commas."""
    return hashlib.sha256(",".join(str(record.label) for record in records).encode()).hexdigest()


def in_turns(first: Sequence[Record], second: Sequence[Record]) -> list[Record]:
    """Two lists in turn in blocks of 16, as VTAB's joint list has them; what is left of the longer one at the end."""
    starts = range(0, max(len(first), len(second)), BLOCK)
    return [record for start in starts for part in (first, second) for record in part[start : start + BLOCK]]


def _stretch(order: Mapping[str, list[Record]], part: Part) -> list[Record]:
    records = order[part.split]
    return records[len(records) * part.start // 100 : len(records) * part.stop // 100]
