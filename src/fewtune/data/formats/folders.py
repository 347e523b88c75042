"""Class folders: one folder a class, alone or below train, val and test."""

from __future__ import annotations

import difflib
import logging
import unicodedata
from pathlib import Path

from fewtune.data.images import find_images, is_hidden
from fewtune.data.split import ImageData, Split
from fewtune.errors import DataError

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def folder_data(root: Path) -> ImageData:
    """The class folders of `root`. Its subfolders are splits if one is called "train" and holds folders itself."""
    splits = _split_folders(root)
    if "train" not in splits:
        names, train = class_folders(root, root)
        return ImageData(name=root.name, class_names=names, train=train)
    names, train = class_folders(splits["train"], root)
    others = {key: class_folders(splits[key], root, names)[1] for key in ("val", "test") if key in splits}
    return ImageData(name=root.name, class_names=names, train=train, **others)


def in_order(path: Path) -> str:
    """A sort key that no file system changes: composed Unicode, "/" between parts."""
    return unicodedata.normalize("NFC", path.as_posix())


def _subfolders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.is_dir() and not is_hidden(p)), key=in_order)


def _split_folders(root: Path) -> dict[str, Path]:
    """Split name -> folder, where `root` has split folders; a class may be called "train" too, and is no split."""
    found: dict[str, Path] = {}
    for folder in _subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split and _subfolders(folder):
            if split in found:
                raise DataError(f"{root} has two {split} folders, {found[split].name} and {folder.name}; keep one")
            found[split] = folder
    return found


def class_folders(
    folder: Path, root: Path, class_names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Split]:
    """The classes and images of one folder of class folders; with `class_names`, the classes must be among these."""
    images = {sub.name: sorted(find_images(sub), key=in_order) for sub in _subfolders(folder)}
    images = {name: paths for name, paths in images.items() if paths}
    if not images:
        raise DataError(_nothing(folder))
    if len(images) == 1 and class_names is None:
        (only,) = images
        inner = [sub.name for sub in _subfolders(folder / only)]
        hint = f"; did you mean {folder / only}, which holds {', '.join(inner[:3])}?" if inner else ""
        raise DataError(f'{folder} has one class folder with images, "{only}", and a task needs at least two{hint}')
    names = class_names or tuple(images)
    for name in images:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise DataError(f'{folder} has a class folder "{name}" that the training images do not have{hint}')
    records = [(path, names.index(name)) for name, paths in images.items() for path in paths]
    loose = [p.name for p in folder.iterdir() if p.is_file() and not is_hidden(p)]
    if loose:
        logger.warning("%s: %d files outside class folders are not used (%s, …)", folder, len(loose), loose[0])
    return names, Split(
        records=[path for path, _ in records],
        labels=[label for _, label in records],
        names=[path.relative_to(root).as_posix() for path, _ in records],
    )


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
