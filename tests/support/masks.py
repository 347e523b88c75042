"""Small images with masks for the tests of segmentation: a bright ellipse on a darker, noisy ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewtune.config import Recipe, recipe_from

SETTINGS: dict[str, Any] = {
    "task": "segmentation",
    "model": "timm:test_vit",
    "pretrained": False,
    "image_size": 32,
    "test_fraction": 0.25,
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 4,
    "accelerator": "cpu",
}


def scene(number: int, width: int = 40, height: int = 30) -> tuple[Image.Image, np.ndarray]:
    """An image and its mask, bool [height, width]; no other number gives the same."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    centre = rng.uniform(0.3, 0.7, 2) * (height, width)
    radii = rng.uniform(0.15, 0.3, 2) * (height, width)
    mask = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1
    pixels = rng.integers(20, 120, (height, width, 3)) + 110 * mask[..., None]
    return Image.fromarray(pixels.astype(np.uint8)), mask


def write_scene(
    folder: Path, stem: str, number: int, suffixes: tuple[str, str] = (".png", ".png"), **size: int
) -> None:
    """folder/images/STEM and folder/masks/STEM."""
    image, mask = scene(number, **size)
    for part, picture, suffix in (("images", image, suffixes[0]), ("masks", Image.fromarray(mask), suffixes[1])):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(folder / part / f"{stem}{suffix}", quality=95)


def mask_folder(root: Path, count: int = 12, first: int = 0, **options: Any) -> Path:
    """`count` images of different sizes with their masks."""
    for number in range(first, first + count):
        write_scene(root, f"scene{number:02d}", number, width=36 + number % 5, height=28 + number % 3, **options)
    return root


def tiny_mask_recipe(data: Path, **changes: Any) -> Recipe:
    """A recipe that trains a random ViT with a linear decoder in a second or two."""
    return recipe_from({**SETTINGS, "data": str(data), **changes})
