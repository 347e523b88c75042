"""`load_masks` and `load_class_masks`: one name or path -> images with masks, in splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fewtune.data.catalog import declaration
from fewtune.data.class_masks import with_classes
from fewtune.data.formats.masks import LOOKED, MASKS, by_hash
from fewtune.data.listing import Expected
from fewtune.data.load import check_fractions, declared_folder
from fewtune.data.masks import MaskData, MaskSplit
from fewtune.data.sampling import complement
from fewtune.data.split import refuse
from fewtune.errors import DataError

M = TypeVar("M", bound=MaskSplit)


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
    check_fractions(val_fraction, test_fraction)
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


def limited_masks(split: M, limit: int) -> M:
    """The first images in the order of the SHA-256 of their stems."""
    return split.subset(_hash_order(split)[:limit])


def _hash_order(split: MaskSplit) -> list[int]:
    """Indices in the order of the SHA-256 of the images' stems."""
    items = split.items()
    return sorted(range(len(split)), key=lambda i: by_hash(items[i]))


def _mask_data(spec: str | Path) -> MaskData:
    if str(spec).startswith("task:"):
        key = str(spec).removeprefix("task:")
        if declaration(key.partition("?")[0]).format != MASKS.name:
            raise DataError(f"{declaration(key.partition('?')[0]).title} has no masks; it is for classification")
        data_set, folder = declared_folder(key)
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


def _some(data: MaskData, indices: Iterable[Any]) -> MaskSplit:
    chosen = data.train.subset(indices)
    if not len(chosen):
        raise DataError(f"{data.name}: {len(data.train)} images are too few to set any aside")
    return chosen


def _drawn(count: int, number: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count)[:number].tolist()
