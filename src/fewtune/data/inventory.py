"""What a data set's folder says it holds: every image with its label, and all that is wrong with the lists.

The loaders stop at the first mistake; here nothing is raised, so that a check can tell all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewtune.data.catalog import Declaration
from fewtune.data.declared import CORRUPTIONS, SEVERITIES, WNID, kvasir_pairs
from fewtune.data.formats import cifar
from fewtune.data.formats.folders import in_order
from fewtune.data.images import find_images, is_hidden
from fewtune.errors import DataError


class Entry(NamedTuple):
    """One image."""

    name: str
    """What messages call it."""
    content: Path | np.ndarray
    """Its file, or its pixels where many images share a file."""
    label: Any
    mask: Path | None = None


@dataclass
class Inventory:
    """Images of each split, classes that were found, and one line for every fault."""

    splits: dict[str, list[Entry]] = field(default_factory=dict)
    classes: int = 0
    faults: list[str] = field(default_factory=list)


def inventory(data_set: Declaration, folder: Path) -> Inventory:
    """List the folder of a data set in its format; files are not opened, but for CIFAR-100's."""
    match data_set.format:
        case "vtab":
            return _vtab(folder, data_set)
        case "fgvc":
            return _fgvc(folder)
        case "cifar":
            return _cifar(folder, data_set)
        case "imagenet":
            return _imagenet(folder)
        case "classes":
            return _classes(folder)
        case "corruptions":
            return _corruptions(folder, data_set)
        case "masks":
            return _masks(folder, data_set)


def _vtab(folder: Path, data_set: Declaration) -> Inventory:
    """Labels are class numbers; all four lists must be there, and agree."""
    found = Inventory(classes=data_set.classes)
    names = {"train": "train800.txt", "val": "val200.txt", "both": "train800val200.txt", "test": "test.txt"}
    listed = {split: _vtab_list(folder / name, found.faults) for split, name in names.items()}
    if listed["both"] and sorted(listed["both"]) != sorted(listed["train"] + listed["val"]):
        found.faults.append("train800val200.txt does not list the images and labels of train800.txt and val200.txt")
    for split in ("train", "val", "test"):
        found.splits[split] = _entries(folder, [folder, folder / "images"], listed[split])
        for name, label in listed[split]:
            if not 0 <= label < data_set.classes:
                last = data_set.classes - 1
                found.faults.append(f"{names[split]}: {name} has the label {label}, off range 0..{last}")
    return found


def _vtab_list(path: Path, faults: list[str]) -> list[tuple[str, int]]:
    text = _text(path, faults)
    entries = []
    for number, line in enumerate((text or "").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if name and label.lstrip("-").isdigit():
            entries.append((name.strip(), int(label)))
        elif line.strip():
            faults.append(f'{path.name}, line {number}: expected "relative/path label" (a whole number), got "{line}"')
    return entries


def _fgvc(folder: Path) -> Inventory:
    """Class ids are any numbers; those of the training images are the classes."""
    found = Inventory()
    listed: dict[str, list[tuple[str, Any]]] = {}
    for split in ("train", "val", "test"):
        text = _text(folder / f"{split}.json", found.faults)
        try:
            content = json.loads(text) if text is not None else {}
        except json.JSONDecodeError as error:
            found.faults.append(f"{split}.json is not valid JSON: {error}")
            content = {}
        if not isinstance(content, dict):
            found.faults.append(f"{split}.json must hold an object {{image path: class id}}")
            content = {}
        listed[split] = list(content.items())
    known = {label for _, label in listed["train"]}
    found.classes = len(known)
    roots = [root for root in (folder / "images", folder / "Images", folder) if root.is_dir()]
    for split, pairs in listed.items():
        found.splits[split] = _entries(folder, roots, pairs)
        for name, label in pairs:
            if label not in known:
                found.faults.append(f'{split}.json: {name} has the label "{label}", off range: not in train.json')
    return found


def _cifar(folder: Path, data_set: Declaration) -> Inventory:
    found = Inventory()
    try:
        found.classes = len(cifar.class_names(folder))
    except DataError as error:
        found.faults.append(_relative(str(error), folder))
    for split in ("train", "test"):
        found.splits[split] = []
        try:
            images, labels, names = cifar.read_images(folder / split)
        except DataError as error:
            found.faults.append(_relative(str(error), folder))
            continue
        found.splits[split] = [Entry(*entry) for entry in zip(names, images, labels, strict=True)]
        for name, label in zip(names, labels, strict=True):
            if not 0 <= label < data_set.classes:
                found.faults.append(f"{name} has the label {label}, off range 0..{data_set.classes - 1}")
    return found


def _imagenet(folder: Path) -> Inventory:
    found = Inventory()
    for split, name in (("train", "train"), ("test", "val")):
        found.splits[split] = _class_folders(folder / name, folder, found.faults)
    known = {entry.label for entry in found.splits["train"]}
    found.classes = len(known)
    for name in sorted({entry.label for entry in found.splits["test"]} - known):
        found.faults.append(f"val/{name}: off range: the training images have no class {name}")
    return found


def _classes(folder: Path) -> Inventory:
    found = Inventory()
    found.splits["test"] = _class_folders(folder, folder, found.faults)
    found.classes = len({entry.label for entry in found.splits["test"]})
    return found


def _corruptions(folder: Path, data_set: Declaration) -> Inventory:
    found, entries = Inventory(), []
    known: set[str] = set()
    each, rest = divmod(data_set.counts.test or 0, len(CORRUPTIONS) * len(SEVERITIES))
    for corruption in CORRUPTIONS:
        if not (folder / corruption).is_dir():
            found.faults.append(f"the folder {corruption} is missing")
            continue
        for severity in SEVERITIES:
            here = _class_folders(folder / corruption / severity, folder, found.faults)
            names = {entry.label for entry in here}
            for name in sorted(names - known) if known else ():
                found.faults.append(f"{corruption}/{severity}/{name}: off range: no folder before it has this class")
            known = known or names
            if here and not rest and len(here) != each:
                found.faults.append(f"{corruption}/{severity} holds {len(here):,} images, {each:,} expected")
            entries += here
    found.splits["test"], found.classes = entries, len(known)
    return found


def _masks(folder: Path, data_set: Declaration) -> Inventory:
    found = Inventory(classes=data_set.classes)
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            found.faults.append(f"the folder {name} is missing")
            return found
    for split, pairs in kvasir_pairs(folder).items():
        found.splits[split] = [Entry(f"images/{image.name}", image, None, mask) for image, mask in pairs]
        lacking = [mask.name for _, mask in pairs if not mask.is_file()]
        found.faults += [f"masks/{name} does not exist, and images/{name} does" for name in lacking]
    own = {entry.name.removeprefix("images/") for entries in found.splits.values() for entry in entries}
    for mask in sorted(find_images(folder / "masks"), key=in_order):
        if mask.name not in own:
            found.faults.append(f"images/{mask.name} does not exist, and masks/{mask.name} does")
    return found


def _class_folders(folder: Path, root: Path, faults: list[str]) -> list[Entry]:
    where = folder.relative_to(root).as_posix() if folder != root else folder.name
    if not folder.is_dir():
        faults.append(f"the folder {where} is missing")
        return []
    entries = []
    for sub in sorted((p for p in folder.iterdir() if p.is_dir() and not is_hidden(p)), key=in_order):
        if not WNID.fullmatch(sub.name):
            faults.append(f'{where}: the class folder "{sub.name}" is not named by a WordNet id such as n01440764')
            continue
        images = sorted(find_images(sub), key=in_order)
        if not images:
            faults.append(f"{where}/{sub.name} holds no images")
        entries += [Entry(path.relative_to(root).as_posix(), path, sub.name) for path in images]
    loose = sum(1 for path in folder.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if loose:
        faults.append(f"{where} holds {loose} images outside class folders; each belongs into the folder of its class")
    return entries


def _entries(folder: Path, roots: list[Path], listed: Iterable[tuple[str, Any]]) -> list[Entry]:
    """Listed images below the first root that has any of them."""
    listed = list(listed)
    root = next((root for root in roots if any((root / name).is_file() for name, _ in listed)), folder)
    return [Entry(name, root / name, label) for name, label in listed]


def _text(path: Path, faults: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        faults.append(f"the list {path.name} is missing")
    except UnicodeDecodeError:
        faults.append(f"{path.name} is no text in UTF-8")
    return None


def _relative(message: str, folder: Path) -> str:
    return message.replace(f"{folder}/", "")
