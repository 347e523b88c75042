"""Tiny folders of images and tiny recipes for the tests of training and of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewtune.config import Recipe, recipe_from

SETTINGS: dict[str, Any] = {
    "model": "timm:test_vit",
    "pretrained": False,
    "image_size": 32,
    "test_fraction": 0.25,
    "epochs": 3,
    "batch_size": 8,
    "accelerator": "cpu",
}


def coloured_folder(root: Path, classes: int = 3, each: int = 12, size: int = 32) -> Path:
    """Class folders of noise with a colour cast, hard enough that a random network does not know them at once."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 200, (size, size, 3))
            pixels[..., label % 3] += 40
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root


def tiny_recipe(data: Path, **changes: Any) -> Recipe:
    """A recipe that trains a random ViT of 300,000 parameters in a second or two."""
    return recipe_from({**SETTINGS, "data": str(data), **changes})


def arguments(data: Path, **changes: Any) -> list[str]:
    """The same recipe as arguments of `fewtune fit`, which would otherwise choose a preset."""
    settings = {"preset": "paper", **SETTINGS, **changes}
    model = settings.pop("model")
    return ["--model", model, "--data", str(data), *(f"{key}={value}" for key, value in settings.items())]


def fewtune(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "fewtune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
