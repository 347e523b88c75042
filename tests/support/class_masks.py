"""Small images with masks of three classes: ground, a bright square and a dark disc; edges are not to count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("ground", "square", "disc")
IGNORED = 255


def scene(number: int, height: int = 32, width: int = 32) -> tuple[Image.Image, np.ndarray]:
    """An image and its class numbers, uint8 [height, width]; no other number gives the same."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(100, 150, (height, width, 3))
    classes = np.zeros((height, width), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    if number % 4:  # one in four has no square
        top, left = rng.integers(1, height // 2 - 6), rng.integers(1, width - 13)
        square = (rows >= top) & (rows < top + 11) & (columns >= left) & (columns < left + 11)
        pixels[square], classes[square] = pixels[square] // 4 + (210, 200, 20), 1
    centre = rng.uniform(0.68, 0.75) * height, rng.uniform(0.3, 0.7) * width
    disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= 36
    pixels[disc], classes[disc] = pixels[disc] // 4 + (10, 20, 150), 2
    classes[0] = IGNORED
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), classes


def class_mask_folder(root: Path, count: int = 24, palette: bool = True, named: bool = True) -> Path:
    """`count` images of different sizes with their masks, grey or with a palette."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, classes = scene(number, 30 + number % 3, 32 + number % 5)
        image.save(root / "images" / f"{number:03d}.png")
        mask = Image.fromarray(classes, "P" if palette else "L")
        if palette:
            mask.putpalette([value for c in range(256) for value in (255 - c, c * 7 % 256, c * 31 % 256)])
        mask.save(root / "masks" / f"{number:03d}.png")
    if named:
        (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root
