"""`load_data`: one name or path -> a labelled image set with its splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewtune.data import libraries
from fewtune.data.catalog import ALIASES, DECLARATIONS, Declaration, declaration, find_folder
from fewtune.data.formats import format_of
from fewtune.data.formats.folders import class_folders
from fewtune.data.formats.masks import MASKS
from fewtune.data.listing import Expected, Listing
from fewtune.data.sampling import complement, few_of_each, stratified
from fewtune.data.shards import shard_data
from fewtune.data.split import ImageData, Split, image_data, refuse, split_of
from fewtune.data.streams import is_streamed, stream_data
from fewtune.errors import DataError, Progress, nearest


def load_data(
    spec: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    shots: int | None = None,
    progress: Progress | None = None,
) -> ImageData:
    """A labelled image set.

    Args:
        spec: a path, whose format is told by what is there (`fewtune.data.formats`): class folders (below
            train/val/test or not), a CSV file with the columns path and label (and split), a VTAB-1k task
            (train800.txt, …), an FGVC task (train.json, …); or "task:KEY?root=FOLDER" (a declared data set, see
            `fewtune data list`), "torchvision:NAME[?root=FOLDER]", "hf:ID[?image=COLUMN&label=COLUMN]",
            "hf:ID?stream" (read where it lies), "demo:textile", "demo:digits"; "wds:SHARDS", a folder of WebDataset's
            tar files or their paths with braces.
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
    check_fractions(val_fraction, test_fraction)
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


def class_split(folder: Path, root: Path) -> tuple[tuple[str, ...], Split]:
    """One folder of class folders, such as ImageNet-A or a severity of a corruption: names in order, and the images."""
    listing = Listing(folder.name)
    names, items = class_folders(folder, root, listing)
    refuse(listing)
    return names, split_of(items)


# From a name or path


def _by_name_or_path(spec: str | Path, progress: Progress | None) -> ImageData:
    match str(spec).partition(":"):
        case ("task", ":", name):
            return _declared(name)
        case ("torchvision", ":", name):
            return libraries.torchvision_data(name, progress)
        case ("hf", ":", name) if is_streamed(name):
            return stream_data(name, progress)
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
    data_set, folder = declared_folder(spec)
    if data_set.format == MASKS.name:
        raise DataError(f"{data_set.title} has masks and no classes; it is a data set for segmentation")
    if data_set.counts.train is None:
        raise DataError(f"{data_set.title} has no training images; score a task of ImageNet-1k on it: fewtune ood")
    return image_data(data_set.listing(folder))


def declared_folder(spec: str) -> tuple[Declaration, Path]:
    key, _, root = spec.partition("?root=")
    data_set = declaration(key)
    if not root:
        raise DataError(f"{data_set.title}: say where it is: --data ROOT, the folder that holds {data_set.folders[0]}/")
    return data_set, find_folder(data_set, root)


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
    hint = nearest(missing, names, prefix=f"{parent / '_'}"[:-1], otherwise=f"; {parent} has no {missing}")
    return f"the data {path} does not exist{hint}"


# Draws


def check_fractions(val: float, test: float | None) -> None:
    """DataError for a share outside [0, 1)."""
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
