"""How fast training images are loaded, against ImageFolder with timm's transforms: the same files, crops and workers.

    python benchmarks/speed/loading.py [--images 256] [--size 400] [--workers 0 2] [--rounds 5]

Rounds are interleaved, so that other work on the machine slows both alike; medians are compared. The ratio is ours by
theirs in images a second: 1 and above is at least as fast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from fewtune.data import load_data, train_transform, two_views
from fewtune.models import Backbone
from fewtune.training.loaders import image_loader

SPEC = Backbone(torch.nn.Identity(), "", (), 4, 224, (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)


def write_images(root: Path, count: int, size: int) -> None:
    """Class folders of JPEGs with the frequencies of photographs (smooth noise), 4:3."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        path = root / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((size * 4 // 3, size), Image.Resampling.BICUBIC).save(path, quality=90)


def ours(root: Path, kind: str, batch: int, workers: int) -> Iterable:
    """The loader of a training epoch."""
    split = load_data(root, val_fraction=0).train.with_transform(train_transform(kind, SPEC))  # type: ignore[arg-type]
    return image_loader(split, batch, shuffle=True, workers=workers)


def theirs(root: Path, kind: str, batch: int, workers: int) -> Iterable:
    """ImageFolder and timm's transform of the same kind."""
    common = {"input_size": 224, "interpolation": "bicubic", "mean": SPEC.mean, "std": SPEC.std}
    if kind == "fgvc":
        transform = timm.data.create_transform(is_training=True, color_jitter=None, **common)
    else:
        transform = timm.data.create_transform(is_training=False, crop_pct=1.0, crop_mode="squash", **common)
    images = ImageFolder(str(root), transform=transform)
    return DataLoader(images, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def seconds(loader: Iterable) -> float:
    """One pass over all images."""
    started = time.perf_counter()
    for batch in loader:
        assert batch[0].shape[1:] == (3, 224, 224)
    return time.perf_counter() - started


def compare(root: Path, kind: str, batch: int, workers: int, rounds: int) -> dict:
    """Median images a second of both, and their ratio."""
    loaders = {"fewtune": ours(root, kind, batch, workers), "ImageFolder + timm": theirs(root, kind, batch, workers)}
    for loader in loaders.values():
        seconds(loader)  # starts the workers, warms the files up
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        for name in list(loaders)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(loaders[name]))
    images = sum(1 for _ in root.rglob("*.jpg"))
    rates = {name: images / statistics.median(values) for name, values in times.items()}
    ratio = rates["fewtune"] / rates["ImageFolder + timm"]
    return {
        "transform": kind,
        "workers": workers,
        **{k: round(v, 1) for k, v in rates.items()},
        "ratio": round(ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=400, help="pixels of the shorter side")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.images, arguments.size)
        for kind in ("fgvc", "plain"):
            for workers in arguments.workers:
                print(json.dumps(compare(Path(folder), kind, arguments.batch, workers, arguments.rounds)), flush=True)
        split = load_data(folder, val_fraction=0).train.with_transform(two_views(SPEC))
        started = time.perf_counter()
        for i in range(min(64, len(split))):
            split[i]
        print(json.dumps({"transform": "two views", "images a second": round(64 / (time.perf_counter() - started), 1)}))


if __name__ == "__main__":
    main()
