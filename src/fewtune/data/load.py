"""`load_data` and `load_masks`: one name or path -> a data set with its splits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.data import libraries
from fewtune.data.catalog import ALIASES, DECLARATIONS, Declaration, declaration, find_folder
from fewtune.data.class_masks import with_classes
from fewtune.data.formats import format_of
from fewtune.data.formats.folders import class_folders
from fewtune.data.formats.masks import LOOKED, MASKS, by_hash
from fewtune.data.listing import Expected, Listing
from fewtune.data.masks import MaskData, MaskSplit
from fewtune.data.sampling import complement, few_of_each, stratified
from fewtune.data.shards import shard_data
from fewtune.data.split import ImageData, Split, image_data, refuse, split_of
from fewtune.errors import DataError


def load_data(
    spec: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    shots: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ImageData:
    """A labelled image set.

    Args:
        spec: a path, whose format is told by what is there (`fewtune.data.formats`): class folders (below
            train/val/test or not), a CSV file with the columns path and label (and split), a VTAB-1k task
            (train800.txt, …), an FGVC task (train.json, …); or "task:KEY?root=FOLDER" (a declared data set, see
            `fewtune data list`), "torchvision:NAME[?root=FOLDER]", "hf:ID[?image=COLUMN&label=COLUMN]",
            "demo:textile", "demo:digits"; "wds:SHARDS", a folder of WebDataset's tar files or their paths with braces.
        seed: of all draws. Draws are stratified; every class keeps an image for training.
        val_fraction: where the data has no validation split, this share of the training images becomes one; 0: none.
        test_fraction: where the data has no test split, this share of all images becomes one, drawn first; None: the
            data's own only (the demo sets set half aside).
        limit_train: use so many of the training images; validation images are split off from these.
        limit_test: use so many of the test images.
        shots: use so many training images of each class, and min(shots, 4) others of each class as validation images.
        progress: told in words what slow work goes on (downloads).

    Raises:
        DataError: the path does not exist (the nearest is named), no format fits, or a list or label is wrong.
    """
    _check_fractions(val_fraction, test_fraction)
    data = _by_name_or_path(spec, progress)
    data.check(decode=False)  # before any draw: a wrong list is to be called that, not "too few images"
    if test_fraction is None and str(spec).startswith("demo:"):
        test_fraction = 0.5
    if data.test is None and test_fraction:
        # The seed of the test set is fixed: runs with several seeds must be tested on the same images.
        train, test = _split_off(data, test_fraction, seed=0)
        data = replace(data, train=train, test=test)
    if shots is not None:
        data = _few_shot(data, shots, seed)
    if limit_train is not None:
        data = replace(data, train=limited(data.name, data.train, limit_train, seed, "train"))
    if limit_test is not None and data.test is not None:
        data = replace(data, test=limited(data.name, data.test, limit_test, 0, "test"))
    if data.val is None and val_fraction:
        train, val = _split_off(data, val_fraction, seed)
        data = replace(data, train=train, val=val)
    return data


def load_masks(
    spec: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> MaskData:
    """Images with masks, in splits; a mask has its image's name, whatever the suffix of either.

    Args:
        spec: a folder that holds images/ and masks/, or train/, val/ and test/ with these in each; or
            "task:kvasir-seg?root=FOLDER".
        seed: of the validation images that are drawn and of `limit_train`.
        val_fraction: where there is no validation split, this share of the training images becomes one; 0: none.
        test_fraction: where there is no test split, this share of all images becomes one: the last ones in the order
            of the SHA-256 of the file's stem, whatever the seed, so that all runs are tested on the same images.
            Kvasir-SEG's 120 test images are taken by that rule.
        limit_train: use so many of the training images; validation images are split off from these.
        limit_test: use so many of the test images, the first by the same order.

    Raises:
        DataError: there is no such folder, an image has no mask, a mask has no image, or a split has too few images.
    """
    draws: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
    return _masks_drawn(_mask_data(spec), **draws, limit_train=limit_train, limit_test=limit_test)


def load_class_masks(
    spec: str | Path, *, ignore: int = 255, names: Sequence[str] | None = None, **draws: Any
) -> MaskData:
    """Images with masks of several classes (`fewtune.data.class_masks.ClassMaskSplit`), in splits.

    Args:
        spec: a folder, as in `load_masks`; masks are PNG files of class numbers, grey or with a palette. A file
            classes.txt in it names the classes, one a line, the first being 0; else they are called by their numbers.
        ignore: the number of pixels that count nowhere.
        names: the classes that it has to have, where these are known.
        draws: seed, val_fraction, test_fraction, limit_train and limit_test, as in `load_masks`.

    Raises:
        DataError: as `load_masks`, or a mask holds no class numbers, or the classes are other than `names`.
    """
    file, said = Path(spec).expanduser() / "classes.txt", None
    if file.is_file():
        said = [name.strip() for name in file.read_text(encoding="utf-8").splitlines() if name.strip()]
    if names is not None and said is not None and list(names) != said:
        raise DataError(f"{file} names the classes {', '.join(said)}, and the task has {', '.join(names)}")
    return _masks_drawn(with_classes(_mask_data(spec), names or said, ignore), **draws)


def _masks_drawn(
    data: MaskData,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> MaskData:
    """The data with the splits that it lacks drawn; see `load_masks`."""
    _check_fractions(val_fraction, test_fraction)
    if data.test is None and test_fraction:
        order = _hash_order(data.train)
        cut = len(order) - round(test_fraction * len(order))
        data = replace(data, train=_some(data, order[:cut]), test=_some(data, order[cut:]))
    if limit_train is not None and limit_train < len(data.train):
        data = replace(data, train=data.train.subset(sorted(_drawn(len(data.train), limit_train, seed))))
    if limit_test is not None and data.test is not None:
        data = replace(data, test=limited_masks(data.test, limit_test))
    if data.val is None and val_fraction:
        away = _drawn(len(data.train), max(1, round(val_fraction * len(data.train))), seed)
        rest = _some(data, complement(np.asarray(away), len(data.train)))
        data = replace(data, train=rest, val=data.train.subset(sorted(away)))
    return data


def class_split(folder: Path, root: Path) -> tuple[tuple[str, ...], Split]:
    """One folder of class folders, such as ImageNet-A or a severity of a corruption: names in order, and the images."""
    listing = Listing(folder.name)
    names, items = class_folders(folder, root, listing)
    refuse(listing)
    return names, split_of(items)


# From a name or path


def _by_name_or_path(spec: str | Path, progress: Callable[[str], None] | None) -> ImageData:
    match str(spec).partition(":"):
        case ("task", ":", name):
            return _declared(name)
        case ("torchvision", ":", name):
            return libraries.torchvision_data(name, progress)
        case ("hf", ":", name):
            return libraries.hf_data(name, progress)
        case ("demo", ":", name):
            return libraries.demo_data(name, progress)
        case ("wds", ":", name):
            return shard_data(name, progress)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(_missing(path))
    known = format_of(path)
    if known is MASKS:
        raise DataError(
            f"{path} looks like images with their masks (images/ and masks/): add task=segmentation, or for masks of "
            "several classes task=semantic-segmentation; if these are two classes, give one of the folders another name"
        )
    return image_data(known.list(path, Expected()))


def _declared(spec: str) -> ImageData:
    """ "KEY?root=ROOT" -> the splits of a declared data set."""
    data_set, folder = _declared_folder(spec)
    if data_set.format == MASKS.name:
        raise DataError(f"{data_set.title} has masks and no classes; it is a data set for segmentation")
    if data_set.counts.train is None:
        raise DataError(f"{data_set.title} has no training images; score a task of ImageNet-1k on it: fewtune ood")
    return image_data(data_set.listing(folder))


def _declared_folder(spec: str) -> tuple[Declaration, Path]:
    key, _, root = spec.partition("?root=")
    data_set = declaration(key)
    if not root:
        raise DataError(f"{data_set.title}: say where it is: --data ROOT, the folder that holds {data_set.folders[0]}/")
    return data_set, find_folder(data_set, root)


def _mask_data(spec: str | Path) -> MaskData:
    if str(spec).startswith("task:"):
        key = str(spec).removeprefix("task:")
        if declaration(key.partition("?")[0]).format != MASKS.name:
            raise DataError(f"{declaration(key.partition('?')[0]).title} has no masks; it is for classification")
        data_set, folder = _declared_folder(key)
        listing = replace(data_set.listing(folder), name=data_set.title)
    else:
        root = Path(spec).expanduser()
        if not root.is_dir():
            raise DataError(f"{root} is no folder; {LOOKED}")
        listing = MASKS.list(root, Expected())
    refuse(listing)
    splits = {
        name: MaskSplit([i.content for i in items], [i.mask for i in items], [i.name for i in items])
        for name, items in listing.splits.items()
    }
    return MaskData(listing.name, listing.class_names, **splits)


def _missing(path: Path) -> str:
    """What to say of a path that does not exist: the first part that is not there, and what is near it."""
    if str(path) in (*DECLARATIONS, *ALIASES):
        return (
            f"{path} is a published data set and no path: say task:{path}?root=ROOT, ROOT being the folder it lies in"
        )
    parent = path.absolute()
    while not parent.exists():
        missing, parent = parent.name, parent.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(missing, names, n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else f"; {parent} has no {missing}"
    return f"the data {path} does not exist{hint}"


# Draws


def _check_fractions(val: float, test: float | None) -> None:
    for name, fraction in (("val_fraction", val), ("test_fraction", test or 0.0)):
        if not 0 <= fraction < 1:
            raise DataError(f"{name} must lie in [0, 1), not {fraction}")


def _split_off(data: ImageData, fraction: float, seed: int) -> tuple[Split, Split]:
    """The training images without a stratified share, and that share."""
    split = data.train
    away = stratified(split.strata(), round(fraction * len(split)), seed, keep=1)
    if len(away) == 0:
        raise DataError(
            f"{data.name}: {len(split)} training images of {data.num_classes} classes are too few to set "
            f"{fraction:.0%} aside and keep one of each class for training"
        )
    return split.subset(complement(away, len(split))), split.subset(away)


def _few_shot(data: ImageData, shots: int, seed: int) -> ImageData:
    """k images of each class to train, and as many, at most 4, to validate (Zhou et al. 2022, CoOp).

    Validation images come from the data's own validation split, else from the training images that were not drawn.
    """
    if data.multi_label:
        raise DataError(f"{data.name}: shots={shots} counts images of one class each, and these have several")
    kept = few_of_each(data.train.labels, shots, seed)
    rest = data.train.subset(complement(kept, len(data.train))) if data.val is None else data.val
    chosen = few_of_each(rest.labels, min(shots, 4), seed)
    lacking = min(data.train.subset(kept).counts(data.num_classes)), len(set(rest.subset(chosen).labels))
    if lacking[0] < shots or lacking[1] < data.num_classes:
        raise DataError(
            f"{data.name}: shots={shots} needs {shots} training images of each class and at least one more to "
            f"validate; a class has fewer"
        )
    return replace(data, train=data.train.subset(kept), val=rest.subset(chosen))


def limited(data: str, split: Split, limit: int, seed: int = 0, name: str = "test") -> Split:
    """A stratified subset in which every class stays; `data` and `name` are what errors call the set and the split."""
    if limit >= len(split):
        return split
    strata = split.strata()
    classes = len(set(strata))
    if limit < classes:
        raise DataError(f"{data}: limit_{name}={limit} is less than one image for each of {classes} classes")
    return split.subset(stratified(strata, limit, seed, at_least=1))


def limited_masks(split: MaskSplit, limit: int) -> MaskSplit:
    """The first images in the order of the SHA-256 of their stems."""
    return split.subset(_hash_order(split)[:limit])


def _hash_order(split: MaskSplit) -> list[int]:
    """Indices in the order of the SHA-256 of the images' stems."""
    items = split.items()
    return sorted(range(len(split)), key=lambda i: by_hash(items[i]))


def _some(data: MaskData, indices: Iterable[Any]) -> MaskSplit:
    chosen = data.train.subset(indices)
    if not len(chosen):
        raise DataError(f"{data.name}: {len(data.train)} images are too few to set any aside")
    return chosen


def _drawn(count: int, number: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count)[:number].tolist()
