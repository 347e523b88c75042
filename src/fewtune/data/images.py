"""Images as people have them, opened as 8-bit RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fewtune.errors import DataError
from fewtune.progress import shown

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2"]
)
"""Suffixes of files that are taken for images, whatever their case."""


ORIENTATION = 0x0112
"""The EXIF tag that tells how to turn a picture; 1: not at all."""


def is_hidden(path: Path) -> bool:
    """Files and folders that systems leave about: `.DS_Store`, `._photo.jpg`, `__MACOSX`, `@eaDir`."""
    return path.name.startswith((".", "@")) or path.name == "__MACOSX"


def find_images(folder: Path) -> Iterator[Path]:
    """All images below `folder`, hidden files and folders left out. The order is the file system's: sort it."""
    for entry in folder.iterdir():
        if is_hidden(entry):
            continue
        if entry.is_dir():
            yield from find_images(entry)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry


def open_image(path: str | Path) -> Image.Image:
    """The image at `path` as 8-bit RGB, upright.

    EXIF orientation is applied. Transparent pixels (RGBA, LA, palettes with transparency) show a white ground.
    16-bit, 32-bit and floating-point grey is scaled to 0..255 (see `to_rgb`). Of an animation: the first frame.

    Raises:
        DataError: the file is missing, is no image, or is cut short; the message names it.
    """
    return read_image(path, str(path))


def read_image(file: str | Path | IO[bytes], name: str) -> Image.Image:
    """As `open_image`, from an open file too; `name` is what an error calls it."""
    with _naming(name), Image.open(file) as image:
        image.load()
        return to_rgb(_upright(image))


def verify_image(path: str | Path) -> None:
    """Decode the file at `path` to its end, at the least cost, and raise `open_image`'s errors."""
    with _naming(str(path)), Image.open(path) as image:
        image.draft("RGB", (32, 32))  # JPEG: reads every byte, but computes an eighth of the pixels
        image.load()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB.

    Grey with more than 8 bits is scaled by its format's range: 16-bit integers by 65,535. A 32-bit integer or float
    image states no range: [0, 1] and [0, 255] are recognised by its extremes, then [0, 65535]; else the image's own
    extremes are used.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image), image.mode), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies, which costs at every loading


def _to_8_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Grey of any depth -> uint8, rounded to the nearest. NaN becomes 0."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0:
        limits = [1.0, 255.0, 65535.0] if mode == "F" else [255.0, 65535.0]
        low, high = 0.0, next((limit for limit in limits if high <= limit), high)
    return np.rint((grey - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns what Pillow raises for a bad file into one DataError that names it."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "the file does not exist"
        case IsADirectoryError():
            return "it is a folder"
        case PermissionError():
            return "no permission to read it"
        case UnidentifiedImageError():
            return "it is not an image in a format that Pillow reads"
        case Image.DecompressionBombError():
            return "it has too many pixels to be decoded safely; make it smaller"
        case _:
            return f"it is damaged or cut short ({' '.join(str(error).split())})"


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; as it is, not copied, where they say nothing or are unreadable."""
    try:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return image


def readable(files: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files that can be decoded to their end, and what is wrong with each of the others."""

    def fault(file: Path) -> str | None:
        try:
            verify_image(file)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        texts = shown(pool.map(fault, files), "opening images", len(files))
        faults = {file: text for file, text in zip(files, texts, strict=True) if text is not None}
    return [file for file in files if file not in faults], faults


def with_faults(
    rows: Sequence[dict[str, Any]], files: Sequence[Path], faults: Mapping[Path, str]
) -> list[dict[str, Any]]:
    """Rows of the readable ones among `files`, joined by those of the others, in the order of the files.

    Where there are faults, each row has a column `error`, None where there is none."""
    if not faults:
        return list(rows)
    predicted = iter(rows)
    keys = [key for key in (rows[0] if rows else {}) if key != "file"]
    return [
        {"file": str(file), **dict.fromkeys(keys), "error": faults[file]}
        if file in faults
        else {**next(predicted), "error": None}
        for file in files
    ]


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files among `paths`, and all images in the folders among them, each folder sorted; hidden files aside."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(find_images(path))
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no image or folder at {path}")
    if not files:
        raise DataError("no images were found in what was given; expected image files, or folders that hold some")
    return files
