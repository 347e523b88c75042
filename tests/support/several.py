"""Small images of any number of classes, with the CSV file that lists them: coloured squares on a grey ground."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}


def coloured_squares(root: Path, images: int = 60, size: int = 32, seed: int = 0) -> Path:
    """The CSV file: each image shows none, some or all of three colours, each in a corner of its own."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "labels"])
        for number in range(images):
            pixels = rng.integers(90, 160, (size, size, 3))
            held = [name for name in COLOURS if rng.random() < 0.45]
            for corner, name in enumerate(COLOURS):
                if name in held:
                    top, left = divmod(corner, 2)
                    half = size // 2
                    pixels[top * half : (top + 1) * half, left * half : (left + 1) * half] = COLOURS[name]
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number:03d}.png")
            writer.writerow([f"{number:03d}.png", ";".join(held)])
    return root / "list.csv"
