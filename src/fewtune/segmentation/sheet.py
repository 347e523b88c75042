"""A sheet of pictures: image, truth, prediction and errors side by side, the worst images first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fewtune.segmentation.predict import overlay

SIDE, GAP, TEXT = 160, 6, 16
MISSED, FALSE, HIT = (40, 90, 255), (230, 40, 40), (60, 190, 90)
"""Colours of the errors, RGB: object that was not painted, ground that was painted, object that was painted."""
COLUMNS = ("image", "truth", "prediction", "errors")
Legend = Sequence[tuple[str, tuple[int, int, int]]]
"""Words and the colour that they explain."""
LEGEND: Legend = (("painted rightly", HIT), ("painted, and is ground", FALSE), ("object, and not painted", MISSED))
Pictures = tuple[Image.Image, Image.Image, Image.Image, Image.Image]
"""Of `COLUMNS`."""


def of_object(
    name: str, image: Image.Image, truth: np.ndarray, painted: np.ndarray, words: str
) -> tuple[str, Pictures]:
    """The row of one image with the mask of an object and what was painted, both bool [H, W]."""
    mask = Image.fromarray(np.where(truth, 255, 0).astype(np.uint8)).convert("RGB")
    return f"{name}    {words}", (image, mask, overlay(image, painted), error_picture(truth, painted))


def error_picture(truth: np.ndarray, painted: np.ndarray) -> Image.Image:
    """Green where object and paint agree, red where ground was painted, blue where object was not, else dark."""
    picture = np.full((*truth.shape, 3), 24, dtype=np.uint8)
    picture[truth & painted], picture[~truth & painted], picture[truth & ~painted] = HIT, FALSE, MISSED
    return Image.fromarray(picture)


def draw_sheet(rows: Sequence[tuple[str, Pictures]], caption: str, legend: Legend = LEGEND) -> Image.Image:
    """One row a sample, in the order given: its words, and image, truth, prediction and errors in colour."""
    fitted = [_fitted_row(pictures) for _, pictures in rows]
    heights = [max(picture.height for picture in row) + TEXT + GAP for row in fitted]
    size = (len(COLUMNS) * (SIDE + GAP) + GAP, 3 * TEXT + GAP + sum(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    _heading(draw, caption, legend)
    top = 3 * TEXT + GAP
    for (words, _), row, height in zip(rows, fitted, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (SIDE + GAP) + (SIDE - picture.width) // 2, top))
        draw.text((GAP, top + height - TEXT - GAP + 1), words, fill="black")
        top += height
    return sheet


def _heading(draw: ImageDraw.ImageDraw, caption: str, legend: Legend) -> None:
    """What is shown, what the colours mean, what the columns are."""
    draw.text((GAP, 2), caption, fill="black")
    left = GAP
    for words, colour in legend:
        draw.rectangle((left, TEXT + 3, left + 9, TEXT + 12), fill=colour)
        draw.text((left + 14, TEXT + 2), words, fill="black")
        left += 30 + int(draw.textlength(words))
    for column, title in enumerate(COLUMNS):
        draw.text((GAP + column * (SIDE + GAP), 2 * TEXT + 2), title, fill="black")


def _fitted_row(pictures: Pictures) -> list[Image.Image]:
    """Each picture at its size on the sheet."""
    smooth, sharp = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return [_fitted(picture, how) for picture, how in zip(pictures, (smooth, sharp, smooth, sharp), strict=True)]


def _fitted(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    """As large as fits into SIDE x SIDE, its shape kept."""
    scale = SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
