"""Mosaics of EuroSAT's tiles, whose classes and masks are known: images of several classes, and masks of several.

As a program it writes them into a folder: ``python tests/support/mosaics.py FOLDER [TRAIN] [TEST]``.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ARCHIVE = Path(os.environ.get("FEWTUNE_TEST_DATA", Path(__file__).parents[3] / "shared/data")) / "eurosat_vtab1k.zip"
TILE = 64
IGNORED = 255
"""In a mask: the middle line between tiles, which belongs to neither."""


def write_mosaics(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Images of 2 x 2 tiles of one to three classes; training and test images share no tile.

    Writes images/, masks/ of class numbers (PNG with a palette; 255 on the lines between tiles), classes.txt with their
    names, and list.csv with the columns path, labels and split; the same images below train/ and test/ for masks.
    """
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(ARCHIVE) as archive, _listing(folder) as rows:
        base = next(name for name in archive.namelist() if name.endswith("classes.txt")).rpartition("/")[0]
        names = archive.read(f"{base}/classes.txt").decode().split()
        for part, tiles, count in (("train", "train800val200.txt", train), ("test", "test.txt", test)):
            by_class = defaultdict(list)
            for line in archive.read(f"{base}/{tiles}").decode().splitlines():
                path, label = line.rsplit(" ", 1)
                by_class[int(label)].append(path)
            for kind in ("images", "masks"):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image, mask = _mosaic(archive, base, by_class, rng)
                name = f"{part}/images/{number:04d}.png"
                image.save(folder / name)
                mask.save(folder / part / "masks" / f"{number:04d}.png")
                held = sorted(set(np.unique(np.asarray(mask)).tolist()) - {IGNORED})
                rows.append([name, ";".join(names[c] for c in held), part])
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder


class _listing:
    """The rows of list.csv, written at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, [["path", "labels", "split"]]

    def __enter__(self) -> list[list[str]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.rows

    def __exit__(self, *_: object) -> None:
        with (self.folder / "list.csv").open("w", newline="") as file:
            csv.writer(file).writerows(self.rows)


def _mosaic(
    archive: zipfile.ZipFile, base: str, by_class: dict[int, list[str]], rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    held = rng.choice(sorted(by_class), size=rng.integers(1, 4), replace=False)
    pixels = np.zeros((2 * TILE, 2 * TILE, 3), dtype=np.uint8)
    classes = np.zeros((2 * TILE, 2 * TILE), dtype=np.uint8)
    for (top, left), c in zip(_corners(), rng.choice(held, size=4), strict=True):
        path = by_class[int(c)][rng.integers(len(by_class[int(c)]))]
        tile = Image.open(io.BytesIO(archive.read(f"{base}/{path}"))).convert("RGB")
        pixels[top : top + TILE, left : left + TILE] = np.asarray(tile)
        classes[top : top + TILE, left : left + TILE] = c
    classes[TILE - 1 : TILE + 1] = classes[:, TILE - 1 : TILE + 1] = IGNORED
    mask = Image.fromarray(classes, "P")
    mask.putpalette([value for c in range(256) for value in ((c * 67) % 256, (c * 131) % 256, (c * 29) % 256)])
    return Image.fromarray(pixels), mask


def _corners() -> Iterator[tuple[int, int]]:
    return ((top, left) for top in (0, TILE) for left in (0, TILE))


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[2:]] or [300, 300]
    print(write_mosaics(Path(sys.argv[1]), *counts))
