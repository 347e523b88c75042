"""A CSV file, or a tab-separated .tsv, that lists images and their classes.

Its columns are path and label, and split if wanted (train, val, test). Paths are relative to the file's folder. Labels
are words or numbers; whole numbers are put in their order. A label of several classes, "red;round", makes the task one
of multi-label classification, and so does a column named labels: there an empty cell means none of the classes.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from fewtune.data.listing import (
    SPLIT_NAMES,
    Expected,
    Format,
    Label,
    Listed,
    Listing,
    in_label_order,
    listed_items,
    numbered,
)

SEPARATOR = ";"


def recognise(path: Path) -> bool:
    """Whether a path is a file that ends in .csv or .tsv."""
    return path.suffix.lower() in (".csv", ".tsv") and path.is_file()


def list_csv(path: Path, expected: Expected) -> Listing:
    """The images that a file lists."""
    listing = Listing(path.stem)
    listed: dict[str, Listed] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
            if "path" not in columns or not {"label", "labels"} & columns.keys():
                names = ", ".join(map(str, reader.fieldnames or ())) or "none"
                listing.faults.append(f"{path} must have the columns path and label in its first line; it has: {names}")
                return listing
            for row in reader:
                values = {key: (row.get(name) or "").strip() for key, name in columns.items()}
                _add(values, listed, f"{path}, line {reader.line_num}", listing.faults)
    except (UnicodeDecodeError, csv.Error) as error:
        listing.faults.append(f"{path} cannot be read as CSV in UTF-8: {error}")
        return listing
    if "train" not in listed:
        lacking = f"training images; its split column has {', '.join(sorted(listed))} only" if listed else "images"
        listing.faults.append(f"{path} lists no {lacking}")
        return listing
    listing.multi_label = "labels" in columns or any(
        SEPARATOR in label for entries in listed.values() for _, label in entries
    )
    if listing.multi_label:
        _several(listing, listed, path)
    else:
        numbered(listing, listed, [path.parent], lambda split: f"{path} ({split})")
    return listing


def _add(values: dict[str, str], listed: dict[str, Listed], where: str, faults: list[str]) -> None:
    """Put one line of the file among the images of its split."""
    image, split = values["path"], values.get("split") or "train"
    label = values.get("labels", values.get("label", ""))
    if not image or not (label or "labels" in values):
        faults.append(f"{where}: the path or the label is empty")
    elif split.lower() not in SPLIT_NAMES:
        faults.append(f'{where}: the split is "{split}"; it must be train, val or test')
    else:
        listed.setdefault(SPLIT_NAMES[split.lower()], []).append((image, label))


def _several(listing: Listing, listed: dict[str, Listed], path: Path) -> None:
    """Labels of any number of classes each."""
    cells = {
        split: [(name, tuple(filter(None, map(str.strip, label.split(SEPARATOR))))) for name, label in entries]
        for split, entries in listed.items()
    }
    classes = in_label_order({name for _, names in cells["train"] for name in names})
    number: dict[Any, int] = {name: i for i, name in enumerate(classes)}
    listing.class_names = tuple(classes)

    def numbers(names: tuple[str, ...]) -> Label:
        return tuple(sorted({number[name] for name in names if name in number}))

    for split, entries in cells.items():
        listing.faults += [
            f'{path} ({split}): {image} has the label "{name}", which no training image has'
            for image, names in entries
            for name in names
            if name not in number
        ]
        listing.splits[split] = listed_items(entries, [path.parent], numbers, listing.faults)


CSV = Format("csv", "a .csv with the columns path and label, and split if wanted", recognise, list_csv)
