"""Download, unpack or draw a data set; where that cannot be done, say what to fetch."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from fewtune.data.catalog import Declaration, find_folder
from fewtune.data.formats import vtab
from fewtune.data.vtab_archives import prepare_task
from fewtune.data.vtab_draw import Draw
from fewtune.errors import DataError, Progress

ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")


def prepare(data_set: Declaration, root: str | Path, progress: Progress) -> Path | None:
    """Put a data set below `root` and give its folder; None where it must be fetched by hand.

    What is there already is left alone. VTAB-1k's tasks are drawn from the archives as torchvision keeps them below
    `root`, which are downloaded where they are not there.

    Raises:
        DataError: a download failed, the archives to unpack are not there, or a draw is not VTAB-1k's.
    """
    if isinstance(data_set.draw, Draw):
        return _drawn(data_set, data_set.draw, Path(root).expanduser(), progress)
    try:
        folder = find_folder(data_set, root)
    except DataError:
        folder = None
    if folder is not None and not (data_set.download == "unpack" and not (folder / "train").is_dir()):
        return folder
    Path(root).mkdir(parents=True, exist_ok=True)
    match data_set.key:
        case "cifar-100":
            _torchvision("CIFAR100", root, progress, train=True)
        case "oxford-flowers":
            _flowers(Path(root), data_set.folders[0], progress)
        case "imagenet-1k":
            _imagenet(folder or Path(root) / data_set.folders[0], progress)
        case _:
            return None
    return find_folder(data_set, root)


def _drawn(data_set: Declaration, rule: Draw, root: Path, progress: Progress) -> Path:
    """A VTAB-1k task's folder, as it lies there or drawn into ROOT/vtab-1k/."""
    try:
        folder = find_folder(data_set, root)
    except DataError:
        folder = None
    if folder is not None and vtab.recognise(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    load = partial(_torchvision, root=root, progress=progress)
    return prepare_task(rule, root / "vtab-1k" / data_set.folders[0], load, progress)


def what_to_fetch(data_set: Declaration, root: str | Path) -> str:
    """What a user must fetch, and where it belongs."""
    why = [f"drawn        {data_set.draw}"] if isinstance(data_set.draw, str) else []
    return "\n".join(
        [
            f"{data_set.title} is not in {root}, and fewtune cannot download it: fetch it by hand.",
            *why,
            f"source page  {data_set.source}",
            f"fetch        {data_set.fetch}",
            f"put it in    {Path(root) / data_set.folders[0]}",
            f"there must be {data_set.layout}",
            f"then         fewtune data check {data_set.key} --data {root}",
        ]
    )


def _torchvision(name: str, root: str | Path, progress: Progress, **arguments: Any) -> Any:
    """One of torchvision's data sets, downloaded to `root` where it is not there."""
    import torchvision

    progress(f"torchvision downloads {name} to {root}")
    try:
        return getattr(torchvision.datasets, name)(root, download=True, **arguments)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        said = " ".join(word for word in str(error).split() if "://" not in word)[:120]
        raise DataError(f"torchvision could not download {name} to {root} ({said}); is there a network?") from error


def _flowers(root: Path, folder: str, progress: Progress) -> None:
    """Oxford Flowers' own splits, written as FGVC's lists beside its images."""
    lists = {}
    for split in ("train", "val", "test"):
        part = _torchvision("Flowers102", root, progress, split=split)
        base = root / "flowers-102"
        lists[split] = {
            Path(path).relative_to(base).as_posix(): int(label) + 1
            for path, label in zip(part._image_files, part._labels, strict=True)
        }
    (root / "flowers-102").rename(root / folder)
    for split, content in lists.items():
        (root / folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _imagenet(folder: Path, progress: Progress) -> None:
    """ImageNet's archives -> train/WNID and val/WNID, by torchvision."""
    lacking = [name for name in ARCHIVES if not (folder / name).is_file()]
    if lacking:
        raise DataError(
            f"ImageNet-1k is given to registered users only: fetch {', '.join(lacking)} and put them into {folder}"
        )
    import torchvision

    for split in ("train", "val"):
        progress(f"unpacking {split} in {folder}")
        torchvision.datasets.ImageNet(str(folder), split=split)
