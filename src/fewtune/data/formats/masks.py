"""Images with masks: images/ and masks/ with files of the same names, alone or below train, val and test."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fewtune.data.formats.folders import in_order, split_folders
from fewtune.data.images import find_images
from fewtune.data.listing import Expected, Format, Item, Listing

KVASIR_TEST = 120
"""Kvasir-SEG's test images, of 1,000."""
LOOKED = "looked for images/ and masks/, in it or in its folders train, val and test"


def recognise(path: Path) -> bool:
    """Whether the folder, or its training part, holds images/ and masks/."""
    if not path.is_dir():
        return False
    return _has_pairs(path) or any(map(_has_pairs, split_folders(path, Listing("")).values()))


def list_masks(root: Path, expected: Expected) -> Listing:
    """A mask has its image's name, whatever the suffix of either. Images without a mask are listed with none.

    Where counts are expected, the folder is that of a published data set whose split is a rule: the last images in the
    order of the SHA-256 of the file's stem are the test set (Kvasir-SEG's 120; of a part of it, the same share).
    """
    listing = Listing(root.name, ("background", "object"))
    if expected.counts is not None:
        items = _paired(root, root, listing)
        items.sort(key=by_hash)
        cut = len(items) - kvasir_test(len(items))
        listing.splits = {"train": items[:cut], "test": items[cut:]}
    elif _has_pairs(root):
        listing.splits["train"] = _paired(root, root, listing)
    else:
        folders = split_folders(root, listing)
        if "train" not in folders or not all(map(_has_pairs, folders.values())):
            listing.faults.append(f"{root} holds no images with masks; {LOOKED}")
            return listing
        listing.splits = {name: _paired(folder, root, listing) for name, folder in folders.items()}
    return listing


def kvasir_test(images: int) -> int:
    """How many of Kvasir-SEG's images are test images; of a small part of it, the same share."""
    return KVASIR_TEST if images >= 900 else round(0.12 * images)


def by_hash(item: Item) -> str:
    """A sort key that goes by an image's file name alone, and like chance."""
    assert isinstance(item.content, Path)
    return hashlib.sha256(item.content.stem.encode()).hexdigest()


def _has_pairs(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _paired(folder: Path, root: Path, listing: Listing) -> list[Item]:
    """The images of folder/images with the masks of folder/masks, in the order of their names without suffix."""
    lacking = [name for name in ("images", "masks") if not (folder / name).is_dir()]
    if lacking:
        listing.faults += [f"the folder {name} is missing" for name in lacking]
        return []
    images, masks = (_by_stem(folder / part, listing) for part in ("images", "masks"))
    for files, others, kind in ((images, masks, "mask"), (masks, images, "image")):
        where = folder / f"{kind}s"
        listing.faults += [
            f"{files[key]} has no {kind}: {where / files[key].name} does not exist, nor any {where / key}.*"
            for key in files
            if key not in others
        ]
    if not images:
        listing.faults.append(f"{folder / 'images'} holds no images")
    return [
        Item(images[key].relative_to(root).as_posix(), images[key], mask=masks.get(key))
        for key in sorted(images, key=lambda key: in_order(Path(key)))
    ]


def _by_stem(folder: Path, listing: Listing) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(find_images(folder)):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in files:
            listing.faults.append(f"{files[key]} and {path.name} have one name; keep one of them")
        files[key] = path
    return files


MASKS = Format(
    "masks",
    "images/*.jpg and masks/*.jpg of the same names; a mask is white (128 and above) on the object",
    recognise,
    list_masks,
)
