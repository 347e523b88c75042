"""The formats in which labelled images lie on disk: one file each, and the table of them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from fewtune.data.formats import cifar, csv, fgvc, folders, imagenet, masks, vtab
from fewtune.data.listing import Format
from fewtune.errors import DataError

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        csv.CSV, vtab.VTAB, fgvc.FGVC, cifar.CIFAR, masks.MASKS, folders.FOLDERS,
        # told by a declaration only, since any folder counts as class folders before:
        imagenet.IMAGENET, imagenet.CLASSES, imagenet.CORRUPTED,
    )
}  # fmt: skip
"""By name; a path has the first format that recognises it."""


@cache
def outside_formats() -> tuple[Format, ...]:
    """The formats that installed packages offer by the entry point `fewtune.formats`."""
    return tuple(point.load() for point in entry_points(group="fewtune.formats"))


def format_of(path: Path) -> Format:
    """The format of a file or folder.

    Raises:
        DataError: it is a file of another kind.
    """
    for known in (*outside_formats(), *FORMATS.values()):
        if known.recognise(path):
            return known
    raise DataError(f"{path} is a file, and not a .csv with the columns path and label; give that, or a folder")
