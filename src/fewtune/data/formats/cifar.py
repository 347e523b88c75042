"""CIFAR-100 as its authors distribute it for Python, read without running anything that a pickle may ask for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.data.listing import Expected, Format, Item, Listing
from fewtune.errors import DataError

PIXELS = 3 * 32 * 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Dicts, lists, text, numbers and NumPy arrays; any other thing in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all but what an array is made of."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_part(path: Path) -> dict[str, Any]:
    """The contents of one file of the Python version.

    Raises:
        DataError: the file is missing, is cut short, or holds something else than arrays and lists.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise DataError(f"{path} is damaged or is no file of CIFAR-100 ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no file of CIFAR-100: it holds a {type(content).__name__}, not a dict")
    return content


def read_images(path: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """Images [N, 32, 32, 3] of 8 bits, fine labels and file names; DataError where the file is not whole."""
    part = read_part(path)
    data, labels = part.get("data"), part.get("fine_labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{path} must hold data of shape [N, {PIXELS}] in 8 bits")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise DataError(f"{path} must hold fine_labels, one for each of its {len(data)} images")
    names = part.get("filenames")
    if not isinstance(names, list) or len(names) != len(data):
        names = [f"{i}" for i in range(len(data))]
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, [int(label) for label in labels], [f"{path.name}/{name}" for name in names]


def class_names(folder: Path) -> tuple[str, ...]:
    """The fine classes, in the order of the labels."""
    names = read_part(folder / "meta").get("fine_label_names")
    if not isinstance(names, list) or not names:
        raise DataError(f"{folder / 'meta'} must hold fine_label_names")
    return tuple(map(str, names))


def recognise(path: Path) -> bool:
    """Whether the folder has the three files of the Python version."""
    return all((path / name).is_file() for name in ("meta", "train", "test"))


def list_cifar(folder: Path, expected: Expected) -> Listing:
    """The files train and test hold the pixels, meta the names of the fine classes."""
    listing = Listing("CIFAR-100")
    try:
        listing.class_names = class_names(folder)
    except DataError as error:
        listing.faults.append(str(error))
    classes = expected.classes or len(listing.class_names)
    for split in ("train", "test"):
        listing.splits[split] = []
        try:
            images, labels, names = read_images(folder / split)
        except DataError as error:
            listing.faults.append(str(error))
            continue
        listing.splits[split] = [Item(*entry) for entry in zip(names, images, labels, strict=True)]
        listing.faults += [
            f"{name} has the label {label}, off range 0..{classes - 1}"
            for name, label in zip(names, labels, strict=True)
            if not 0 <= label < classes
        ]
    return listing


CIFAR = Format("cifar", "the files train, test and meta of the Python version", recognise, list_cifar)
