"""`load_data`: one name or path -> an `ImageData` with its splits."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fewtune.data import libraries, lists
from fewtune.data.declared import declared_data
from fewtune.data.formats import folders
from fewtune.data.sampling import complement, few_of_each, stratified
from fewtune.data.split import ImageData, Split
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
        spec: a path, whose format is told by what is there: class folders (below train/val/test or not), a CSV file
            with the columns path and label (and split), a VTAB-1k task (train800.txt, …), an FGVC task (train.json,
            …); or "task:KEY?root=FOLDER" (a declared data set, see `fewtune data list`),
            "torchvision:NAME[?root=FOLDER]", "hf:ID[?image=COLUMN&label=COLUMN]", "demo:textile",
            "demo:digits".
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
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction or 0.0)):
        if not 0 <= fraction < 1:
            raise DataError(f"{name} must lie in [0, 1), not {fraction}")
    data = _found(spec, progress)
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
        data = replace(data, train=_limited(data, data.train, limit_train, seed, "train"))
    if limit_test is not None and data.test is not None:
        data = replace(data, test=_limited(data, data.test, limit_test, 0, "test"))
    if data.val is None and val_fraction:
        train, val = _split_off(data, val_fraction, seed)
        data = replace(data, train=train, val=val)
    return data


def _split_off(data: ImageData, fraction: float, seed: int) -> tuple[Split, Split]:
    """The training images without a stratified share, and that share."""
    split = data.train
    away = stratified(split.labels, round(fraction * len(split)), seed, keep=1)
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
    kept = few_of_each(data.train.labels, shots, seed)
    if data.val is not None:
        own, pool = data.val, range(len(data.val))
    else:
        own, pool = data.train, complement(kept, len(data.train)).tolist()
    rest = own.subset(pool)
    chosen = few_of_each(rest.labels, min(shots, 4), seed)
    lacking = min(data.train.subset(kept).counts(data.num_classes)), len(set(rest.subset(chosen).labels))
    if lacking[0] < shots or lacking[1] < data.num_classes:
        raise DataError(
            f"{data.name}: shots={shots} needs {shots} training images of each class and at least one more to "
            f"validate; a class has fewer"
        )
    return replace(data, train=data.train.subset(kept), val=rest.subset(chosen))


def _limited(data: ImageData, split: Split, limit: int, seed: int, name: str) -> Split:
    """A stratified subset in which every class stays."""
    if limit >= len(split):
        return split
    classes = len(set(split.labels))
    if limit < classes:
        raise DataError(f"{data.name}: limit_{name}={limit} is less than one image for each of {classes} classes")
    return split.subset(stratified(split.labels, limit, seed, at_least=1))


def _found(spec: str | Path, progress: Callable[[str], None] | None) -> ImageData:
    match str(spec).partition(":"):
        case ("task", ":", name):
            return declared_data(name)
        case ("torchvision", ":", name):
            return libraries.torchvision_data(name, progress)
        case ("hf", ":", name):
            return libraries.hf_data(name, progress)
        case ("demo", ":", name):
            return libraries.demo_data(name, progress)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".tsv"):
            raise DataError(f"{path} is a file, and not a .csv with the columns path and label; give that, or a folder")
        return lists.csv_data(path)
    if lists.is_vtab(path):
        return lists.vtab_data(path)
    if lists.is_fgvc(path):
        return lists.fgvc_data(path)
    return folders.folder_data(path)


def _missing(path: Path) -> str:
    """What to say of a path that does not exist: the first part that is not there, and what is near it."""
    parent = path.absolute()
    while not parent.exists():
        missing, parent = parent.name, parent.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(missing, names, n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else f"; {parent} has no {missing}"
    return f"the data {path} does not exist{hint}"
