"""A fine-grained task: train.json, val.json and test.json, each {relative image path: class id}."""

from __future__ import annotations

import json
from pathlib import Path

from fewtune.data.listing import Expected, Format, Listed, Listing, numbered, read_list


def recognise(path: Path) -> bool:
    """Whether the folder has FGVC's training list."""
    return (path / "train.json").is_file()


def list_fgvc(folder: Path, expected: Expected) -> Listing:
    """Class ids are any numbers or words; they become 0..n-1 in their order.

    Images lie in images/, Images/ or the folder itself.
    """
    listing = Listing(folder.name)
    listed = {
        split: entries
        for split in ("train", "val", "test")
        if (entries := _read(folder / f"{split}.json", listing)) or split == "train"
    }
    roots = [root for root in (folder / "images", folder / "Images", folder) if root.is_dir()]
    numbered(listing, listed, roots, lambda split: f"{folder}/{split}.json")
    return listing


def _read(path: Path, listing: Listing) -> Listed:
    lacking = f"{path.parent} has a train.json and is without its list {path.name}"
    text = read_list(path, lacking, listing.gaps if path.name == "val.json" else listing.faults)
    if text is None:
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        listing.faults.append(f"{path} is not valid JSON: {error}")
        return []
    if not isinstance(content, dict) or not content:
        listing.faults.append(f"{path} must hold an object {{image path: class id}} with at least one image")
        return []
    return list(content.items())


FGVC = Format(
    "fgvc",
    "train.json, val.json, test.json, each {relative image path: class id}; images below images/, Images/ or the "
    "folder itself",
    recognise,
    list_fgvc,
)
