"""Data sets by name: torchvision's, those of Hugging Face's datasets, and two for a first try."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from fewtune.assets import TEXTILE, cache_folder, fetch, scratch
from fewtune.data.formats.folders import FOLDERS
from fewtune.data.images import to_rgb
from fewtune.data.listing import SPLIT_NAMES, Expected
from fewtune.data.split import ImageData, Split, image_data
from fewtune.errors import DataError, MissingExtra, Progress, nearest, one_line

_TRAIN_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[str, dict[str, Any]] = {name: {"split": name} for name in ("train", "val", "test")}
_VAL_IS_TEST: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "val"}}
_ONE: dict[str, dict[str, Any]] = {"train": {}}

TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(["CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"], _TRAIN_FLAG),
    **dict.fromkeys(["Food101", "GTSRB", "STL10", "StanfordCars", "SVHN"], _TWO),
    **dict.fromkeys(["Country211", "DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"], _THREE),
    **dict.fromkeys(["CLEVRClassification", "ImageNet", "Imagenette"], _VAL_IS_TEST),
    **dict.fromkeys(["Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"], _ONE),
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
"""torchvision's classification data sets: split -> the arguments that choose it. Where the labels of the test images
are not public (ImageNet, …), the validation images are the test set, as published figures have it."""

DEMOS = ("textile", "digits")


def torchvision_data(spec: str, progress: Progress | None = None) -> ImageData:
    """ "NAME" or "NAME?root=FOLDER": a data set of torchvision, downloaded where it can be and is not there."""
    import torchvision

    name, options = options_of(spec, ("root",))
    if name not in TORCHVISION:
        raise DataError(f'torchvision has no classification data set "{name}"{_near(name, TORCHVISION)}')
    kind = getattr(torchvision.datasets, name)
    root = options.get("root") or str(cache_folder() / "torchvision")
    sets = {}
    for split, arguments in TORCHVISION[name].items():
        if progress:
            progress(f"loading torchvision's {name} ({split}) in {root}")
        sets[split] = _torchvision_set(name, kind, root, arguments)
    splits = {
        split: Split(
            records=range(len(dataset)),
            labels=_labels(dataset),
            names=[f"{name}/{split}/{i}" for i in range(len(dataset))],
            read=ItemImage(dataset),
        )
        for split, dataset in sets.items()
    }
    classes = list(getattr(sets["train"], "classes", None) or getattr(sets["train"], "categories", None) or ())
    if not classes:
        classes = list(range(1 + max(max(split.labels) for split in splits.values())))
    return ImageData(name=name, class_names=tuple(map(_class_name, classes)), **splits)


def _torchvision_set(name: str, kind: Any, root: str, arguments: dict[str, Any]) -> Any:
    """The set as it lies in `root`, else downloaded."""
    try:
        return kind(root, **arguments)
    except (RuntimeError, OSError, ValueError):
        pass  # not there yet; whatever is wrong beyond that shows again below
    try:
        return kind(root, download=True, **arguments)
    except TypeError:
        raise DataError(
            f"torchvision cannot download {name}; its documentation says which files to put into {root}"
        ) from None
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise DataError(
            f"torchvision's {name} is not in {root} and could not be downloaded "
            f"({one_line(error, 120)}); is there a network?"
        ) from error


def _labels(dataset: Any) -> list[int]:
    """All labels, without decoding the images where the data set has them in a list."""
    for attribute in ("targets", "_labels", "labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return [int(label) for label in labels]
    samples = getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return [int(label) for _, label in samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _class_name(name: Any) -> str:
    """Some of torchvision's classes have several names."""
    return str(name[0]) if isinstance(name, tuple) else str(name)


def hf_data(spec: str, progress: Progress | None = None) -> ImageData:
    """ "ID" or "FOLDER", with "?image=COLUMN&label=COLUMN" where the columns are not found by their types."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "hf") from None
    name, options = options_of(spec, ("image", "label"))
    if progress:
        progress(f"loading the data set {name}")
    try:
        saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        dataset = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data set hf:{name} could not be loaded ({one_line(error, 120)}); is the name right?"
        ) from error
    parts = dataset if isinstance(dataset, dict) else {"train": dataset}
    sets = {SPLIT_NAMES[key.lower()]: part for key, part in parts.items() if key.lower() in SPLIT_NAMES}
    if "train" not in sets:
        raise DataError(f"hf:{name} has no train split; it has {', '.join(parts)}")
    features = sets["train"].features
    image = hf_column(name, features, datasets.Image, options.get("image"), ("image", "img"))
    label = hf_column(name, features, datasets.ClassLabel, options.get("label"), ("label", "labels", "fine_label"))
    raw = {split: list(part[label]) for split, part in sets.items()}
    records = {split: (ItemImage(part, image), range(len(part))) for split, part in sets.items()}
    return numbered_splits(name, raw, getattr(features[label], "names", None), records)


def numbered_splits(
    name: str,
    raw: Mapping[str, list[Any]],
    classes: Sequence[str] | None,
    records: Mapping[str, tuple[Callable[[Any], Image.Image], Sequence[Any]]],
) -> ImageData:
    """Splits of a set of datasets.

    Args:
        raw: split -> the labels, as its column has them.
        classes: their names, where labels number them.
        records: split -> how its images are read, and what of.

    Raises:
        DataError: an image has a label that is no class of the training images.
    """
    numbers = {value: i for i, value in enumerate(range(len(classes)) if classes else sorted(set(raw["train"])))}
    splits = {}
    for split, (read, held) in records.items():
        strange = next((value for value in raw[split] if value not in numbers), None)
        if strange is not None:
            raise DataError(
                f'hf:{name}: the {split} split has the label "{strange}", which is no class of the training'
            )
        splits[split] = Split(
            records=held,
            labels=[numbers[value] for value in raw[split]],
            names=[f"{name}/{split}/{i}" for i in range(len(held))],
            read=read,
        )
    return ImageData(name=Path(name).name, class_names=tuple(map(str, classes or numbers)), **splits)


def hf_column(name: str, features: Mapping[str, object], kind: type, asked: str | None, usual: tuple[str, ...]) -> str:
    """The column that is asked for; else the only one of a type, else the first with a usual name.

    Raises:
        DataError: there is none.
    """
    columns = ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise DataError(f'hf:{name} has no column "{asked}"; it has {columns}')
        return asked
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    named = [column for column in usual if column in (typed or features)]
    if len(typed) == 1 or named:
        return named[0] if named else typed[0]
    option = "image" if kind.__name__ == "Image" else "label"
    raise DataError(f"hf:{name}: which column holds the {option}s? Say hf:{name}?{option}=COLUMN; it has {columns}")


@dataclass(frozen=True)
class ItemImage:
    """Reads the image of an item of somebody else's data set: its field `field`, as RGB."""

    dataset: Any
    field: str | int = 0

    def __call__(self, index: int) -> Image.Image:
        return to_rgb(self.dataset[index][self.field])


def demo_data(name: str, progress: Progress | None = None) -> ImageData:
    """A set for a first try.

    - "textile": 2,000 SIMULATED pictures of textile inspection, 250 px (conformal-clip-data 0.1.4, MIT): 1,000 nominal,
      500 with a global and 500 with a local defect; fetched through pip.
    - "digits": scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, in memory.
    """
    match name:
        case "textile":
            listing = FOLDERS.list(textile_folder(progress), Expected())
            return image_data(replace(listing, name="demo:textile"))
        case "digits":
            return _digits()
        case _:
            raise DataError(f'no demo data set is called "{name}"{_near(name, DEMOS)}')


def textile_folder(progress: Progress | None = None) -> Path:
    """The folder of class folders global, local and nominal, taken out of the wheel on first use."""
    target = cache_folder() / f"textile-{TEXTILE.version}"
    if target.is_dir():
        return target
    wheel = fetch(TEXTILE, progress)
    prefix = "conformal_clip_data/data/textile_images/simulated/"
    with scratch() as folder, zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and member.endswith(".jpg"):
                kind, file = member.removeprefix(prefix).split("/")
                (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
                (folder / "images" / kind / file).write_bytes(archive.read(member))
        try:
            os.replace(folder / "images", target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    dataset = load_digits()
    pixels = np.rint(dataset.images * (255 / 16)).astype(np.uint8)  # 17 levels of grey
    return ImageData(
        name="demo:digits",
        class_names=tuple(map(str, dataset.target_names)),
        train=Split(
            records=[np.repeat(image[:, :, None], 3, axis=2) for image in pixels],
            labels=[int(label) for label in dataset.target],
            names=[f"digits/{i}" for i in range(len(pixels))],
            read=Image.fromarray,
        ),
    )


def options_of(spec: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """ "NAME?key=value&…" -> the name and its options."""
    name, _, query = spec.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in known:
            raise DataError(f'"{spec}": unknown option "{key}"; there is {" and ".join(known)}')
    return name, options


def _near(name: str, known: Collection[str]) -> str:
    return nearest(name, known, count=3, otherwise=f"; there is {', '.join(known)}")
