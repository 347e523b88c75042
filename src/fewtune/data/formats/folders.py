"""Class folders: one folder a class, alone or below train, val and test."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from fewtune.data.images import find_images, is_hidden
from fewtune.data.listing import SPLIT_NAMES, UNKNOWN, Expected, Format, Item, Listing
from fewtune.errors import nearest


def recognise(path: Path) -> bool:
    """Whether a path is a folder; what is wrong with it is for the listing to say."""
    return path.is_dir()


def list_folders(root: Path, expected: Expected) -> Listing:
    """The class folders of `root`. Its subfolders are splits if one is called "train" and holds folders itself."""
    listing = Listing(root.name)
    splits = split_folders(root, listing)
    if "train" not in splits:
        listing.class_names, listing.splits["train"] = class_folders(root, root, listing)
        return listing
    listing.class_names, listing.splits["train"] = class_folders(splits["train"], root, listing)
    for name in ("val", "test"):
        if name in splits:
            listing.splits[name] = class_folders(splits[name], root, listing, listing.class_names)[1]
    return listing


def in_order(path: Path) -> str:
    """A sort key that no file system changes: composed Unicode, "/" between parts."""
    return unicodedata.normalize("NFC", path.as_posix())


def subfolders(folder: Path) -> list[Path]:
    """The folders within one, hidden ones left out, in their order."""
    return sorted((p for p in folder.iterdir() if p.is_dir() and not is_hidden(p)), key=in_order)


def split_folders(root: Path, listing: Listing) -> dict[str, Path]:
    """Split name -> folder, where `root` has split folders; a class may be called "train" too, and is no split."""
    splits: dict[str, Path] = {}
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None or not subfolders(folder):
            continue
        if split in splits:
            names = f"{splits[split].name} and {folder.name}"
            listing.faults.append(f"{root} has two {split} folders, {names}; keep one")
        splits[split] = folder
    return splits


def class_folders(
    folder: Path, root: Path, listing: Listing, class_names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], list[Item]]:
    """The classes and images of one folder of class folders; with `class_names`, the classes must be among these."""
    images = {sub.name: sorted(find_images(sub), key=in_order) for sub in subfolders(folder)}
    images = {name: paths for name, paths in images.items() if paths}
    if not images:
        listing.faults.append(_nothing(folder))
    if len(images) == 1 and class_names is None:
        (only,) = images
        inner = [sub.name for sub in subfolders(folder / only)]
        hint = f"; did you mean {folder / only}, which holds {', '.join(inner[:3])}?" if inner else ""
        listing.faults.append(
            f'{folder} has one class folder with images, "{only}", and a task needs at least two{hint}'
        )
    names = class_names or tuple(images)
    number = {name: i for i, name in enumerate(names)}
    for name in images:
        if name not in number:
            listing.faults.append(
                f'{folder}/{name} is off range: the training images have no class "{name}"{nearest(name, names)}'
            )
    loose = [p.name for p in folder.iterdir() if p.is_file() and not is_hidden(p)]
    if loose:
        listing.notes.append(f"{folder}: {len(loose)} files outside class folders are not used ({loose[0]}, …)")
    return names, [
        Item(path.relative_to(root).as_posix(), path, number.get(name, UNKNOWN))
        for name, paths in images.items()
        for path in paths
    ]


def _nothing(folder: Path) -> str:
    """What to say of a folder in which no format was recognised."""
    looked = (
        "looked for class folders with images, train/val/test folders of these, a VTAB-1k task (train800.txt, "
        "train800val200.txt), an FGVC task (train.json); a CSV file is given by its own path"
    )
    loose = sum(1 for _ in find_images(folder))
    if loose:
        return f"{folder} holds {loose} images but no class folders to label them by; {looked}"
    return f"no images in {folder}; {looked}"


FOLDERS = Format("folders", "one folder a class, alone or below train/, val/ and test/", recognise, list_folders)
