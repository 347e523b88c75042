"""Small copies of the published data sets, each in its true format on disk, and faults to plant in them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fewtune.data.catalog import Declaration, declaration
from fewtune.data.formats.imagenet import CORRUPTIONS, SEVERITIES
from fewtune.data.listing import Counts

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475")
"""The first classes of ImageNet-1k."""
CLASS_IDS = (3, 17, 40)
"""FGVC's class ids are not contiguous."""


def picture(path: Path, number: int, label: int = 0, size: int = 12) -> Path:
    """A small JPEG that no other number gives; its colour goes with its label."""
    rng = np.random.default_rng((label, number))
    pixels = np.clip(50 * label + rng.integers(0, 100, (size, size, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="JPEG", quality=90)
    return path


def build(key: str, root: Path, train: int = 6, val: int = 3, test: int = 6) -> Declaration:
    """A miniature of a data set below `root`, and what is to be expected of it."""
    data_set = declaration(key)
    folder = root / data_set.folders[0]
    folder.mkdir(parents=True)
    match data_set.format:
        case "fgvc":
            return _fgvc(data_set, folder, {"train": train, "val": val, "test": test})
        case "vtab":
            return _vtab(data_set, folder, {"train": train, "val": val, "test": test})
        case "cifar":
            return _cifar(data_set, folder, train, test)
        case "imagenet":
            wnids = WNIDS
            for split, count in (("train", train), ("val", test)):
                _folders(folder / split, wnids, count, "JPEG", offset=1000 * (split == "val"))
            return data_set.part(len(wnids), Counts(train * len(wnids), None, test * len(wnids)))
        case "classes":
            wnids = WNIDS[1:4] if key == "imagenet-a" else WNIDS[2:]
            _folders(folder, wnids, test, "jpg", offset=2000)
            (folder / "README.txt").write_text("as distributed")
            return data_set.part(len(wnids), Counts(test=test * len(wnids)))
        case "corruptions":
            for i, corruption in enumerate(CORRUPTIONS):
                for severity in SEVERITIES:
                    _folders(folder / corruption / severity, WNIDS, 1, "JPEG", offset=3000 + 10 * i + int(severity))
            return data_set.part(len(WNIDS), Counts(test=75 * len(WNIDS)))
        case "masks":
            return _kvasir(data_set, folder, train + test)


def _folders(folder: Path, wnids: tuple[str, ...], count: int, suffix: str, offset: int) -> None:
    for wnid in wnids:
        for i in range(count):
            picture(folder / wnid / f"{wnid}_{i}.{suffix}", offset + i, WNIDS.index(wnid))


def _fgvc(data_set: Declaration, folder: Path, counts: dict[str, int]) -> Declaration:
    images = {"stanford-dogs": "Images", "cub-200-2011": "images", "nabirds": "images"}.get(data_set.key, "")
    for s, (split, count) in enumerate(counts.items()):
        listed = {}
        for i in range(count):
            label = i % len(CLASS_IDS)
            name = f"class{label}/{split}_{i}.jpg"
            picture(folder / images / name, 100 * s + i, label)
            listed[name] = CLASS_IDS[label]
        (folder / f"{split}.json").write_text(json.dumps(listed))
    return data_set.part(len(CLASS_IDS), Counts(**counts))


def _vtab(data_set: Declaration, folder: Path, counts: dict[str, int]) -> Declaration:
    lines: dict[str, list[str]] = {}
    for s, (split, count) in enumerate(counts.items()):
        lines[split] = []
        for i in range(count):
            label = i % min(3, data_set.classes)
            picture(folder / "images" / split / f"{i:06d}.jpg", 100 * s + i, label)
            lines[split].append(f"images/{split}/{i:06d}.jpg {label}")
    files = {"train800": lines["train"], "val200": lines["val"], "train800val200": lines["train"] + lines["val"],
             "test": lines["test"]}  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return data_set.part(counts=Counts(**counts))


def _cifar(data_set: Declaration, folder: Path, train: int, test: int) -> Declaration:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        part = {
            "filenames": [f"{split}_{i}.png" for i in range(count)],
            "batch_label": split,
            "fine_labels": [i % 4 for i in range(count)],
            "coarse_labels": [0] * count,
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
        (folder / split).write_bytes(pickle.dumps(part, protocol=2))
    names = {"fine_label_names": [f"class{i:02d}" for i in range(100)], "coarse_label_names": ["all"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return data_set.part(counts=Counts(train, None, test))


def _kvasir(data_set: Declaration, folder: Path, count: int) -> Declaration:
    for i in range(count):
        picture(folder / "images" / f"polyp{i}.jpg", i)
        mask = np.zeros((12, 12), dtype=np.uint8)
        mask[3:9, 3:9] = 255
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"polyp{i}.jpg")
    test = round(0.12 * count)
    return data_set.part(counts=Counts(count - test, None, test))


# Faults. Each plants some and gives the words of the line that must tell of it.


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def plant(data_set: Declaration, root: Path) -> list[tuple[str, ...]]:
    """Plant all faults that a format can have: missing file, label off range, truncated image, leak, wrong count."""
    folder = root / data_set.folders[0]
    return _PLANTERS[data_set.format](folder)


def _plant_fgvc(folder: Path) -> list[tuple[str, ...]]:
    lists = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    (base,) = {path.parent.parent for path in folder.rglob("train_0.jpg")}
    names = {split: list(listed) for split, listed in lists.items()}
    (base / names["train"][0]).unlink()
    lists["test"][names["test"][0]] = 9999
    cut(base / names["val"][0])
    (base / names["test"][1]).write_bytes((base / names["train"][1]).read_bytes())
    del lists["val"][names["val"][2]]
    for split, listed in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(listed))
    return [
        (names["train"][0], "does not exist"),
        (names["test"][0], "9999", "off range"),
        (names["val"][0], "damaged or cut short"),
        (names["test"][1], "same image", names["train"][1]),
        ("val: 2 images, 3 expected",),
    ]


def _plant_vtab(folder: Path) -> list[tuple[str, ...]]:
    lines = (folder / "test.txt").read_text().splitlines()
    lines[0] = lines[0].rpartition(" ")[0] + " 400"
    (folder / "test.txt").write_text("\n".join(lines[:-1]) + "\n")
    images = folder / "images"
    (images / "train/000000.jpg").unlink()
    cut(images / "val/000000.jpg")
    (images / "test/000001.jpg").write_bytes((images / "train/000001.jpg").read_bytes())
    return [
        ("images/train/000000.jpg", "does not exist"),
        ("test.txt: images/test/000000.jpg", "400", "off range"),
        ("images/val/000000.jpg", "damaged or cut short"),
        ("images/test/000001.jpg", "same image", "images/train/000001.jpg"),
        ("test: 5 images, 6 expected",),
    ]


def _plant_cifar(folder: Path) -> list[tuple[str, ...]]:
    train, test = (pickle.loads((folder / split).read_bytes()) for split in ("train", "test"))
    test["fine_labels"][0] = 100
    test["data"][1] = train["data"][1]
    for column in ("filenames", "fine_labels", "coarse_labels", "data"):
        test[column] = test[column][:-1]
    (folder / "test").write_bytes(pickle.dumps(test, protocol=2))
    (folder / "meta").unlink()
    return [
        ("meta does not exist",),
        ("0 classes, 100 expected",),
        ("test/test_0.png", "label 100", "off range"),
        ("test/test_1.png", "same image", "train/train_1.png"),
        ("test: 5 images, 6 expected",),
    ]


def _plant_imagenet(folder: Path) -> list[tuple[str, ...]]:
    a, b, *_, last = WNIDS
    (folder / f"train/{a}/{a}_0.JPEG").unlink()
    (folder / "val" / last).rename(folder / "val/n99999999")
    cut(folder / f"train/{a}/{a}_1.JPEG")
    (folder / f"val/{b}/{b}_0.JPEG").write_bytes((folder / f"train/{b}/{b}_0.JPEG").read_bytes())
    return [
        ("train: 29 images, 30 expected",),
        ("val/n99999999", "off range"),
        (f"train/{a}/{a}_1.JPEG", "damaged or cut short"),
        (f"val/{b}/{b}_0.JPEG", "same image", f"train/{b}/{b}_0.JPEG"),
    ]


def _plant_classes(folder: Path) -> list[tuple[str, ...]]:
    first, second, third = sorted(path for path in folder.iterdir() if path.is_dir())
    (first / f"{first.name}_0.jpg").unlink()
    cut(second / f"{second.name}_1.jpg")
    third.rename(folder / "dog")
    return [
        ("test: 11 images, 18 expected",),
        (f"{second.name}/{second.name}_1.jpg", "damaged or cut short"),
        ('"dog"', "WordNet id"),
        ("2 classes, 3 expected",),
    ]


def _plant_corruptions(folder: Path) -> list[tuple[str, ...]]:
    a = WNIDS[0]
    for image in (folder / "fog/3").rglob("*.JPEG"):
        image.unlink()
    for sub in (folder / "fog/3").iterdir():
        sub.rmdir()
    (folder / "fog/3").rmdir()
    cut(folder / f"snow/1/{a}/{a}_0.JPEG")
    (folder / f"frost/2/{a}").rename(folder / "frost/2/n99999999")
    picture(folder / f"contrast/5/{a}/more.JPEG", 9999)
    return [
        ("fog/3 is missing",),
        (f"snow/1/{a}/{a}_0.JPEG", "damaged or cut short"),
        ("frost/2/n99999999", "off range"),
        ("contrast/5 holds 6 images, 5 expected",),
        ("test: 371 images, 375 expected",),
    ]


def _plant_masks(folder: Path) -> list[tuple[str, ...]]:
    splits = declaration("kvasir-seg").listing(folder).splits
    pairs = {name: [(item.content, item.mask) for item in items] for name, items in splits.items()}
    (train, second, third, *_), (test, *_) = pairs["train"], pairs["test"]
    train[1].unlink()
    cut(second[0])
    Image.new("L", (5, 5)).save(third[1])
    test[0].write_bytes(train[0].read_bytes())
    (folder / "masks/alone.jpg").write_bytes(test[1].read_bytes())
    return [
        (f"masks/{train[1].name} does not exist",),
        (f"images/{second[0].name}", "damaged or cut short"),
        (f"masks/{third[1].name} has 5 x 5 pixels",),
        (f"images/{test[0].name}", "same image", f"images/{train[0].name}"),
        ("images/alone.jpg does not exist",),
    ]


_PLANTERS: dict[str, Callable[[Path], list[tuple[str, ...]]]] = {
    "fgvc": _plant_fgvc, "vtab": _plant_vtab, "cifar": _plant_cifar, "imagenet": _plant_imagenet,
    "classes": _plant_classes, "corruptions": _plant_corruptions, "masks": _plant_masks,
}  # fmt: skip
