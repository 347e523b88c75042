"""Builders of images and image folders for the tests: odd formats, damaged files, small labelled sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewtune.data import load_data
from fewtune.errors import DataError

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
ORIENTATION = 0x0112  # EXIF tag


def picture(width: int = 32, height: int = 16) -> Image.Image:
    """Four corners: red, green, blue, grey (left to right, top to bottom)."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    middle, centre = height // 2, width // 2
    pixels[:middle, :centre], pixels[:middle, centre:] = RED, GREEN
    pixels[middle:, :centre], pixels[middle:, centre:] = BLUE, GREY
    return Image.fromarray(pixels)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters, left to right, top to bottom."""
    across, down = (image.width // 4, 3 * image.width // 4), (image.height // 4, 3 * image.height // 4)
    return [image.getpixel((x, y)) for y in down for x in across]  # type: ignore[misc]


def exif_rotated(folder: Path) -> Path:
    """Stored on its side, with the EXIF mark that says how to turn it (6: by 90 degrees clockwise)."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = folder / "rotated.JPG"
    picture().transpose(Image.Transpose.ROTATE_90).save(path, format="JPEG", exif=exif, quality=95)
    return path


def cmyk(folder: Path) -> Path:
    path = folder / "print.jpg"
    picture().convert("CMYK").save(path, quality=95)
    return path


def palette(folder: Path) -> Path:
    path = folder / "palette.gif"
    picture().convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    return path


def non_ascii(folder: Path) -> Path:
    path = folder / "größe 図.png"
    picture().save(path)
    return path


def opaque_rgba(folder: Path) -> Path:
    path = folder / "opaque.png"
    picture().convert("RGBA").save(path)
    return path


COLOURED: list[Callable[[Path], Path]] = [exif_rotated, cmyk, palette, non_ascii, opaque_rgba]
"""Builders whose file shows `picture()`."""


def truncated(path: Path) -> Path:
    """A file whose last half is missing."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def plain(path: Path, colour: tuple[int, int, int], size: int = 16, seed: int = 0) -> Path:
    """A small picture of one colour with a little noise."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.integers(-20, 21, (size, size, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], size: int = 16) -> Path:
    """root/CLASS/NUMBER.png, each class in a colour of its own."""
    colours = [RED, GREEN, BLUE, GREY, (255, 255, 0), (0, 255, 255)]
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            plain(root / name / f"{i:03d}.png", colours[number % len(colours)], size, seed=1000 * number + i)
    return root


def fails(spec: str | Path, *words: str, **options) -> str:
    """load_data raises a DataError of one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        load_data(spec, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message
