"""`load_masks`: a folder of images and masks, or a declared data set -> its splits."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from fewtune.data.catalog import declaration
from fewtune.data.declared import find_folder, kvasir_pairs
from fewtune.data.formats.folders import SPLIT_NAMES, in_order
from fewtune.data.images import find_images, is_hidden
from fewtune.data.mask_split import MaskData, MaskSplit
from fewtune.data.sampling import complement
from fewtune.errors import DataError

LOOKED = "looked for images/ and masks/, in it or in its folders train, val and test"


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
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction or 0.0)):
        if not 0 <= fraction < 1:
            raise DataError(f"{name} must lie in [0, 1), not {fraction}")
    data = _found(spec)
    if data.test is None and test_fraction:
        order = _by_hash(data.train)
        cut = len(order) - round(test_fraction * len(order))
        data = replace(data, train=_some(data, order[:cut]), test=_some(data, order[cut:]))
    if limit_train is not None and limit_train < len(data.train):
        data = replace(data, train=data.train.subset(sorted(_drawn(len(data.train), limit_train, seed))))
    if limit_test is not None and data.test is not None:
        data = replace(data, test=data.test.subset(_by_hash(data.test)[:limit_test]))
    if data.val is None and val_fraction:
        away = _drawn(len(data.train), max(1, round(val_fraction * len(data.train))), seed)
        data = replace(
            data, train=_some(data, complement(np.asarray(away), len(data.train))), val=data.train.subset(sorted(away))
        )
    return data


def _found(spec: str | Path) -> MaskData:
    if str(spec).startswith("task:"):
        return _declared(str(spec).removeprefix("task:"))
    root = Path(spec).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; {LOOKED}")
    if _has_pairs(root):
        return MaskData(root.name, paired(root, root))
    folders = {
        SPLIT_NAMES[sub.name.lower()]: sub
        for sub in sorted(root.iterdir())
        if sub.is_dir() and sub.name.lower() in SPLIT_NAMES and not is_hidden(sub)
    }
    if "train" not in folders or not all(map(_has_pairs, folders.values())):
        raise DataError(f"{root} holds no images with masks; {LOOKED}")
    return MaskData(root.name, **{name: paired(folder, root) for name, folder in folders.items()})


def _declared(name: str) -> MaskData:
    key, _, root = name.partition("?root=")
    data_set = declaration(key)
    if data_set.format != "masks":
        raise DataError(f"{data_set.title} has no masks; it is a data set for classification")
    if not root:
        raise DataError(f"{data_set.title}: say where it is: --data ROOT, the folder that holds {data_set.folders[0]}/")
    folder = find_folder(data_set, root)
    known = paired(folder, folder)
    where = {path: number for number, path in enumerate(known.images)}
    parts = {split: known.subset(where[image] for image, _ in own) for split, own in kvasir_pairs(folder).items()}
    return MaskData(data_set.title, parts["train"], test=parts["test"])


def _has_pairs(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def paired(folder: Path, root: Path) -> MaskSplit:
    """The images of folder/images with the masks of folder/masks, by name without suffix, in the order of the names.

    Raises:
        DataError: one has no partner, or two; or there are none.
    """
    images, masks = (_by_stem(folder / part, root) for part in ("images", "masks"))
    for found, others, missing in ((images, masks, "mask"), (masks, images, "image")):
        alone = [key for key in found if key not in others]
        if alone:
            path, rest = found[alone[0]], len(alone) - 1
            more = f"; nor have {rest} more" if rest else ""
            raise DataError(f"{path} has no {missing}: there is no {folder / f'{missing}s' / alone[0]}.*{more}")
    if not images:
        raise DataError(f"{folder / 'images'} holds no images")
    keys = sorted(images, key=lambda key: in_order(Path(key)))
    return MaskSplit(
        images=[images[key] for key in keys],
        masks=[masks[key] for key in keys],
        names=[images[key].relative_to(root).as_posix() for key in keys],
    )


def _by_stem(folder: Path, root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(find_images(folder)):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise DataError(f"{found[key]} and {path.name} have one name; keep one of them")
        found[key] = path
    return found


def _by_hash(split: MaskSplit) -> list[int]:
    """Indices in the order of the SHA-256 of the images' stems."""
    return sorted(range(len(split)), key=lambda i: hashlib.sha256(split.images[i].stem.encode()).hexdigest())


def _some(data: MaskData, indices: list[int] | np.ndarray) -> MaskSplit:
    if not len(indices):
        raise DataError(f"{data.name}: {len(data.train)} images are too few to set any aside")
    return data.train.subset(indices)


def _drawn(count: int, number: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count)[:number].tolist()
