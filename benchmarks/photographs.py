"""What the benchmarks on real photographs share: the images, the recipe all runs begin from, quiet single-thread work.

The photographs are found through FEWTUNE_TEST_DATA (default ../shared/data), the textile images are fewtune's own demo.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = {"flowers": "flowers5_128.zip", "trashnet": "trashnet_256.zip"}
TITLES = {
    "flowers": "flowers, 5 kinds",
    "trashnet": "refuse (TrashNet), 6 kinds",
    "textile": "textile inspection (simulated), 3 kinds",
}


def unpacked(name: str, cache: Path) -> Path:
    """The data set's class folders, unpacked once into the cache."""
    target = cache / name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        source = Path(os.environ.get("FEWTUNE_TEST_DATA", ROOT / "../shared/data")) / ARCHIVES[name]
        partial = cache / f"{name}.partial"
        with zipfile.ZipFile(source) as archive:
            archive.extractall(partial)
        partial.rename(target)
    (folder,) = target.iterdir()
    return folder


def source(name: str, cache: Path) -> str:
    """What a recipe's `data` says of a set of images."""
    return "demo:textile" if name == "textile" else str(unpacked(name, cache))


def recipe(data: str | Path, method: str, seed: int, **changed: Any) -> Any:
    """A checked recipe: the pretrained demo ViT-S at 98 px, 1,000 training images, 1,000 test images, on the CPU."""
    from fewtune.config import recipe_from

    values = {
        "model": "demo:vit-small", "image_size": 98, "data": str(data), "method": method, "seed": seed,
        "limit_train": 1000, "limit_test": 1000, "test_fraction": 0.4, "val_fraction": 0.2, "batch_size": 16,
        "augment": "plain", "cache": True, "warmup_epochs": 1, "accelerator": "cpu", "devices": 1,
    }  # fmt: skip
    return recipe_from(values | changed)


def one_thread() -> None:
    """Two processes of one thread use two cores better than one process of two."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
