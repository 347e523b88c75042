"""ImageNet-1k and the sets beside it: folders named by WordNet ids.

In these a folder called val is the test set, as published figures have it; so they are told by a declaration, and
never by the look of a folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewtune.data.formats.folders import in_order, subfolders
from fewtune.data.images import find_images
from fewtune.data.listing import UNKNOWN, Counts, Expected, Format, Item, Listing

WNID = re.compile(r"n\d{8}")
"""A WordNet id, the name of a class folder."""
SEVERITIES = ("1", "2", "3", "4", "5")
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of ImageNet-C (Hendrycks and Dietterich 2019)."""


def list_imagenet(folder: Path, expected: Expected) -> Listing:
    """train/WNID and val/WNID. The 50,000 validation images are the test set; nothing may be chosen on them."""
    listing = Listing("ImageNet-1k")
    for split, name in (("train", "train"), ("test", "val")):
        _add(folder / name, folder, split, listing)
    return listing


def list_classes(folder: Path, expected: Expected) -> Listing:
    """One folder a class; all images are test images."""
    listing = Listing(folder.name)
    _add(folder, folder, "test", listing)
    return listing


def list_corruptions(folder: Path, expected: Expected) -> Listing:
    """CORRUPTION/SEVERITY/WNID; all images are test images, as many in each corruption and severity."""
    listing = Listing(folder.name)
    each, rest = divmod((expected.counts or Counts()).test or 0, len(CORRUPTIONS) * len(SEVERITIES))
    for corruption in CORRUPTIONS:
        if not (folder / corruption).is_dir():
            listing.faults.append(f"the folder {corruption} is missing")
            continue
        for severity in SEVERITIES:
            before = len(listing.splits.get("test", ()))
            _add(folder / corruption / severity, folder, "test", listing)
            number = len(listing.splits["test"]) - before
            if number and each and not rest and number != each:
                listing.faults.append(f"{corruption}/{severity} holds {number:,} images, {each:,} expected")
    return listing


def _add(folder: Path, root: Path, split: str, listing: Listing) -> None:
    """Put the images of a folder of class folders into a split; the first such folder names the classes."""
    where = folder.relative_to(root).as_posix() if folder != root else folder.name
    items = listing.splits.setdefault(split, [])
    if not folder.is_dir():
        listing.faults.append(f"the folder {where} is missing")
        return
    named = [sub for sub in subfolders(folder) if WNID.fullmatch(sub.name)]
    images = {sub.name: sorted(find_images(sub), key=in_order) for sub in named}
    listing.class_names = listing.class_names or tuple(images)
    number = {name: i for i, name in enumerate(listing.class_names)}
    for sub in subfolders(folder):
        if sub.name not in images:
            listing.faults.append(
                f'{where}: the class folder "{sub.name}" is not named by a WordNet id such as n01440764'
            )
        elif not images[sub.name]:
            listing.faults.append(f"{where}/{sub.name} holds no images")
        elif sub.name not in number:
            listing.faults.append(f"{where}/{sub.name}: off range: no folder before it has this class")
    for name, paths in images.items():
        label = number.get(name, UNKNOWN)
        items += [Item(path.relative_to(root).as_posix(), path, label) for path in paths]
    loose = sum(1 for path in folder.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if loose:
        listing.faults.append(
            f"{where} holds {loose} images outside class folders; each belongs into the folder of its class"
        )


IMAGENET = Format(
    "imagenet",
    "train/WNID/*.JPEG and val/WNID/*.JPEG, one folder a class; val/ is the test set",
    lambda path: (path / "train").is_dir() and (path / "val").is_dir(),
    list_imagenet,
)
CLASSES = Format(
    "classes",
    "WNID/*.jpg, one folder for each of 200 classes of ImageNet-1k",
    lambda path: path.is_dir() and any(WNID.fullmatch(entry.name) for entry in path.iterdir()),
    list_classes,
)
CORRUPTED = Format(
    "corruptions",
    "CORRUPTION/SEVERITY/WNID/*.JPEG, 15 corruptions in severities 1 to 5",
    lambda path: any((path / name).is_dir() for name in CORRUPTIONS),
    list_corruptions,
)
