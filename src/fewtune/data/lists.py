"""Images listed in files: CSV, the lists of VTAB-1k, the JSON files of FGVC."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fewtune.data.formats.folders import SPLIT_NAMES
from fewtune.data.images import SUFFIXES
from fewtune.data.split import ImageData, Split
from fewtune.errors import DataError

VTAB_CLASSES = {
    "caltech101": 102,
    "cifar": 100,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""The classes of each VTAB-1k task, by its folder's name; a draw of 1,000 images need not hold all of them."""

Listed = list[tuple[str, Any]]
"""(path as listed, label as listed)"""


def csv_data(path: Path) -> ImageData:
    """A CSV (or tab-separated .tsv) file with the columns path and label, and split if wanted (train, val, test).

    Paths are relative to the file's folder. Labels are words or numbers; whole numbers are put in their order.
    """
    listed: dict[str, Listed] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
            if not {"path", "label"} <= columns.keys():
                found = ", ".join(map(str, reader.fieldnames or ())) or "none"
                raise DataError(f"{path} must have the columns path and label in its first line; it has: {found}")
            for row in reader:
                split, image, label = _csv_row(row, columns, f"{path}, line {reader.line_num}")
                listed.setdefault(split, []).append((image, label))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if not listed:
        raise DataError(f"{path} lists no images")
    if "train" not in listed:
        raise DataError(f"{path} lists no training images; its split column has {', '.join(sorted(listed))} only")
    return _listed_data(path.stem, listed, [path.parent], f"{path}")


def _csv_row(row: dict[Any, Any], columns: dict[str, Any], where: str) -> tuple[str, str, str]:
    values = {key: (row.get(name) or "").strip() for key, name in columns.items() if isinstance(key, str)}
    if not values["path"] or not values["label"]:
        raise DataError(f"{where}: the path or the label is empty")
    split = values.get("split") or "train"
    if split.lower() not in SPLIT_NAMES:
        raise DataError(f'{where}: the split is "{split}"; it must be train, val or test')
    return SPLIT_NAMES[split.lower()], values["path"], values["label"]


def is_vtab(folder: Path) -> bool:
    """Whether the folder has one of VTAB-1k's training lists."""
    return any((folder / name).is_file() for name in ("train800.txt", "train800val200.txt"))


def vtab_data(folder: Path, classes: int | None = None) -> ImageData:
    """A VTAB-1k task: 800 images to train, 200 to validate, the rest to test; a line of a list is "path label".

    `classes` is known for a declared task; else the folder's name tells it.
    Without train800.txt and val200.txt the 1,000 images of train800val200.txt are the training images.
    """
    files = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    if not (folder / "train800.txt").is_file():
        files = {"train": "train800val200.txt", "test": "test.txt"}
    for name in files.values():
        if not (folder / name).is_file():
            raise DataError(f"{folder} is a VTAB-1k task without its list {name}")
    listed = {split: _vtab_list(folder / name) for split, name in files.items()}
    known = classes or VTAB_CLASSES.get(folder.name)
    return _numbered_data(folder, listed, known)


def _vtab_list(path: Path) -> Listed:
    entries: Listed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.lstrip("-").isdigit():
            raise DataError(f'{path}, line {number}: expected "relative/path label" with a whole number, got "{line}"')
        entries.append((name.strip(), int(label)))
    if not entries:
        raise DataError(f"{path} lists no images")
    return entries


def _numbered_data(folder: Path, listed: dict[str, Listed], known: int | None) -> ImageData:
    """Labels that are the class numbers themselves."""
    numbers = sorted({label for entries in listed.values() for _, label in entries})
    classes = known or len(numbers)
    wrong = [n for n in numbers if not 0 <= n < classes]
    if wrong:
        split, (name, label) = next((s, e) for s, entries in listed.items() for e in entries if e[1] == wrong[-1])
        why = "this task has" if known else "the lists have"
        raise DataError(
            f"{folder}: {name} ({split}) has the label {label}, out of range: {why} {classes} classes, "
            f"so labels must lie in 0..{classes - 1}"
        )
    splits = {split: _split(entries, [folder, folder / "images"], lambda n: n) for split, entries in listed.items()}
    return ImageData(name=folder.name, class_names=tuple(map(str, range(classes))), **splits)


def is_fgvc(folder: Path) -> bool:
    """Whether the folder has FGVC's training list."""
    return (folder / "train.json").is_file()


def fgvc_data(folder: Path) -> ImageData:
    """A fine-grained task: train.json, val.json, test.json, each {relative image path: class id}.

    Class ids are any numbers or words; they become 0..n-1 in their order. Images lie in images/, Images/ or the
    folder itself.
    """
    if not (folder / "test.json").is_file():
        raise DataError(f"{folder} has a train.json and is without its list test.json")
    listed = {
        split: _fgvc_list(folder / f"{split}.json")
        for split in ("train", "val", "test")
        if (folder / f"{split}.json").is_file()
    }
    roots = [root for root in (folder / "images", folder / "Images", folder) if root.is_dir()]
    return _listed_data(folder.name, listed, roots, str(folder))


def _fgvc_list(path: Path) -> Listed:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} must hold an object {{image path: class id}} with at least one image")
    return list(content.items())


def _listed_data(name: str, listed: dict[str, Listed], roots: list[Path], where: str) -> ImageData:
    """Labels of any kind: the classes are those of the training images, in order."""
    classes = _ordered({label for _, label in listed["train"]})
    number = {label: i for i, label in enumerate(classes)}
    for split, entries in listed.items():
        for path, label in entries:
            if label not in number:
                raise DataError(f'{where}: {path} ({split}) has the label "{label}", which no training image has')
    splits = {split: _split(entries, roots, number.__getitem__) for split, entries in listed.items()}
    return ImageData(name=name, class_names=tuple(map(str, classes)), **splits)


def _ordered(labels: Iterable[Any]) -> list[Any]:
    """Whole numbers by value, anything else by its letters."""
    found = list(labels)
    if all(str(label).lstrip("-").isdigit() for label in found):
        return sorted(found, key=int)
    return sorted(found, key=str)


def _split(entries: Listed, roots: list[Path], number: Callable[[Any], int]) -> Split:
    """The split of a list, in the order of its paths; the root is the first under which the first image lies."""
    entries = sorted(entries, key=lambda entry: entry[0])
    first = entries[0][0]
    root = next((root for root in roots if (root / first).is_file()), None)
    if root is None:
        looked = " and ".join(str(root) for root in roots)
        raise DataError(f"the image {first} is listed and does not exist (looked in {looked})")
    strange = [name for name, _ in entries if Path(name).suffix.lower() not in SUFFIXES]
    if strange:
        raise DataError(f"{strange[0]} is listed and is not an image ({', '.join(sorted(SUFFIXES))})")
    return Split(
        records=[root / name for name, _ in entries],
        labels=[number(label) for _, label in entries],
        names=[name for name, _ in entries],
    )
