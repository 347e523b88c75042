"""The public archives of VTAB-1k's tasks as torchvision reads them, and the folder of a task drawn from one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fewtune.data.formats.vtab import NAMES
from fewtune.data.vtab_draw import Draw, Record, drawn
from fewtune.errors import DataError, Progress
from fewtune.files import write_text

Load = Callable[..., Any]
"""torchvision's data set of a name, with the arguments that choose a split."""


class Public(NamedTuple):
    """A public data set: all records by split of TensorFlow Datasets, and the classes in the order of the labels."""

    splits: dict[str, list[Record]]
    classes: tuple[str, ...]


def prepare_task(rule: Draw, folder: Path, load: Load, progress: Progress) -> Path:
    """Draw a task's lists and put them and their images into `folder`, which appears when it is whole.

    Args:
        rule: of the task.
        folder: the task's; it must be empty or not there.
        load: gives torchvision's data sets.
        progress: told in words what goes on.

    Raises:
        DataError: as `vtab_draw.drawn`, the archive cannot be had, or `folder` holds other files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} holds other files, and not the lists of a VTAB-1k task; move it away")
    public = READERS[rule.archive](load)
    lists = drawn(rule, public.splits)
    records = {record.name: record for records in lists.values() for record in records}
    progress(f"writing {len(records):,} images and {len(lists)} lists to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        part = Path(scratch) / folder.name
        for record in records.values():
            _place(record.content, part / "images" / record.name)
        for name, listed in lists.items():
            lines = [f"images/{record.name} {record.label}" for record in listed]
            write_text(part / name, "\n".join(lines) + "\n")
        write_text(part / NAMES, "\n".join(public.classes) + "\n")
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    return folder


def _place(content: Path | np.ndarray, target: Path) -> None:
    """A file as a link to the archive's own where the disk can, else as a copy; pixels as PNG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(np.ascontiguousarray(content)).save(target)
        return
    try:
        os.link(content, target)
    except OSError:
        shutil.copyfile(content, target)


def _pixels(split: str, images: Sequence[np.ndarray], labels: Sequence[int]) -> list[Record]:
    """Images without files: a record's key is its position."""
    return [
        Record(str(i), int(label), f"{split}/{i:06d}.png", image)
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _files(paths: Sequence[str | Path], labels: Sequence[int], parents: int = 0) -> list[Record]:
    """Images with files: a record's key is its file's name, with so many of the folders above it."""
    names = ["/".join(Path(path).parts[-1 - parents :]) for path in paths]
    return [Record(name, int(label), name, Path(path)) for name, path, label in zip(names, paths, labels, strict=True)]


def _cifar(load: Load) -> Public:
    parts = {split: load("CIFAR100", train=split == "train") for split in ("train", "test")}
    splits = {split: _pixels(split, part.data, part.targets) for split, part in parts.items()}
    return Public(splits, tuple(parts["train"].classes))


def _svhn(load: Load) -> Public:
    parts = {split: load("SVHN", split=split) for split in ("train", "test")}
    splits = {split: _pixels(split, part.data.transpose(0, 2, 3, 1), part.labels) for split, part in parts.items()}
    return Public(splits, tuple("0123456789"))


def _dtd(load: Load) -> Public:
    parts = {split: load("DTD", split=name) for split, name in _SPLITS.items()}
    splits = {split: _files(part._image_files, part._labels, parents=1) for split, part in parts.items()}
    return Public(splits, tuple(parts["train"].classes))


def _flowers(load: Load) -> Public:
    parts = {split: load("Flowers102", split=name) for split, name in _SPLITS.items()}
    splits = {split: _files(part._image_files, part._labels) for split, part in parts.items()}
    return Public(splits, tuple(parts["train"].classes))


def _pets(load: Load) -> Public:
    parts = {split: load("OxfordIIITPet", split=name) for split, name in (("train", "trainval"), ("test", "test"))}
    splits = {split: _files(part._images, part._labels) for split, part in parts.items()}
    return Public(splits, tuple(parts["train"].classes))


def _eurosat(load: Load) -> Public:
    images = load("EuroSAT")
    paths, labels = zip(*images.samples, strict=True)
    records = _files(paths, labels, parents=1)
    splits = {"train": [record._replace(key=record.name.replace("/", "_", 1)) for record in records]}
    return Public(splits, tuple(images.classes))


_SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""TensorFlow Datasets' names of splits, and torchvision's."""

READERS: dict[str, Callable[[Load], Public]] = {
    "CIFAR100": _cifar, "SVHN": _svhn, "DTD": _dtd, "Flowers102": _flowers, "OxfordIIITPet": _pets,
    "EuroSAT": _eurosat,
}  # fmt: skip
"""By the name of torchvision's data set."""
