"""A declared data set on disk: where its folder is, and its splits."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fewtune.data import lists
from fewtune.data.catalog import DECLARATIONS, Declaration, declaration
from fewtune.data.formats import folders
from fewtune.data.formats.cifar import cifar_data
from fewtune.data.images import find_images
from fewtune.data.split import ImageData, Split
from fewtune.errors import DataError

WNID = re.compile(r"n\d{8}")
"""A WordNet id, the name of a class folder of ImageNet."""
SEVERITIES = ("1", "2", "3", "4", "5")
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of ImageNet-C (Hendrycks and Dietterich 2019)."""
KVASIR_TEST = 120


def declared_data(spec: str) -> ImageData:
    """ "KEY?root=ROOT" -> the splits of a declared data set; ROOT holds its folder, or is it.

    Raises:
        DataError: no data set has the key, it is not below ROOT, or it has no training images with classes.
    """
    key, _, root = spec.partition("?root=")
    data_set = declaration(key)
    if not root:
        raise DataError(f"{data_set.title}: say where it is: --data ROOT, the folder that holds {data_set.folders[0]}/")
    folder = find_folder(data_set, root)
    match data_set.format:
        case "fgvc":
            return lists.fgvc_data(folder)
        case "vtab":
            return lists.vtab_data(folder, data_set.classes)
        case "cifar":
            return cifar_data(folder)
        case "imagenet":
            return imagenet_data(folder)
        case "masks":
            raise DataError(f"{data_set.title} has masks and no classes; it is a data set for segmentation")
        case _:
            raise DataError(f"{data_set.title} has no training images; score a task of ImageNet-1k on it: fewtune ood")


def find_folder(data_set: Declaration, root: str | Path) -> Path:
    """The folder of a data set: below `root`, or `root` itself.

    Raises:
        DataError: it is not there; the message says what was looked for.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the one that holds {data_set.folders[0]}/ ({data_set.title})")
    parents = [root, root / "vtab-1k", root / "VTAB-1k"] if data_set.format == "vtab" else [root, root / "FGVC"]
    for folder in (parent / name for parent in parents for name in data_set.folders):
        if folder.is_dir():
            return folder
    if root.resolve().name in data_set.folders:
        return root
    others = {name for other in DECLARATIONS.values() for name in other.folders}
    if _looks_like(data_set, root) and root.resolve().name not in others:
        return root
    raise DataError(
        f"{data_set.title} is not in {root}: there is no {data_set.folders[0]}/; "
        f"`fewtune data info {data_set.key}` says what to fetch"
    )


def _looks_like(data_set: Declaration, folder: Path) -> bool:
    """Whether a folder has the marks of a format."""
    match data_set.format:
        case "fgvc":
            return lists.is_fgvc(folder)
        case "vtab":
            return lists.is_vtab(folder)
        case "cifar":
            return (folder / "meta").is_file()
        case "imagenet":
            return (folder / "train").is_dir() and (folder / "val").is_dir()
        case "classes":
            return any(WNID.fullmatch(entry.name) for entry in folder.iterdir())
        case "corruptions":
            return any((folder / name).is_dir() for name in CORRUPTIONS)
        case "masks":
            return (folder / "images").is_dir() and (folder / "masks").is_dir()


def imagenet_data(folder: Path) -> ImageData:
    """ImageNet-1k: train/WNID and val/WNID. The 50,000 validation images are the test set, as published figures have
    it; nothing may be chosen on them."""
    names, train = folders.class_folders(folder / "train", folder)
    return ImageData("ImageNet-1k", names, train, test=folders.class_folders(folder / "val", folder, names)[1])


def class_split(folder: Path, root: Path) -> tuple[tuple[str, ...], Split]:
    """The class folders of ImageNet-A or -R, or of one severity of a corruption: names in order, and the images."""
    return folders.class_folders(folder, root)


def kvasir_pairs(folder: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Kvasir-SEG's (image, mask) pairs of "train" and "test"; masks may be missing.

    The paper's split is not published: images are ordered by the SHA-256 of the file's stem, the last 120 are the
    test set (of 1,000; of fewer images, the same share of 12 %).
    """
    images = sorted(find_images(folder / "images"), key=lambda path: hashlib.sha256(path.stem.encode()).hexdigest())
    test = KVASIR_TEST if len(images) >= 900 else round(0.12 * len(images))
    pairs = [(path, folder / "masks" / path.name) for path in images]
    return {"train": pairs[: len(pairs) - test], "test": pairs[len(pairs) - test :]}
