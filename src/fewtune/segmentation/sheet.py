"""A sheet of pictures: image, truth, prediction and errors side by side, the worst images first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fewtune.segmentation.predict import overlay

SIDE, GAP, TEXT = 160, 6, 16
MISSED, FALSE, HIT = (40, 90, 255), (230, 40, 40), (60, 190, 90)
"""Colours of the errors, RGB: object that was not painted, ground that was painted, object that was painted."""
COLUMNS = ("image", "truth", "prediction", "errors")


@dataclass(frozen=True)
class Sample:
    """One image with its truth and its mask, both bool [H, W], and its measures in a few words."""

    name: str
    image: Image.Image
    truth: np.ndarray
    painted: np.ndarray
    words: str


def error_picture(truth: np.ndarray, painted: np.ndarray) -> Image.Image:
    """Green where object and paint agree, red where ground was painted, blue where object was not, else dark."""
    picture = np.full((*truth.shape, 3), 24, dtype=np.uint8)
    picture[truth & painted], picture[~truth & painted], picture[truth & ~painted] = HIT, FALSE, MISSED
    return Image.fromarray(picture)


def draw_sheet(samples: Sequence[Sample], caption: str) -> Image.Image:
    """One row a sample, in the order given: image, truth, prediction (tinted), errors in colour."""
    rows = [_pictures(sample) for sample in samples]
    heights = [max(picture.height for picture in row) + TEXT + GAP for row in rows]
    size = (len(COLUMNS) * (SIDE + GAP) + GAP, 3 * TEXT + GAP + sum(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    _heading(draw, caption)
    top = 3 * TEXT + GAP
    for sample, row, height in zip(samples, rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (SIDE + GAP) + (SIDE - picture.width) // 2, top))
        draw.text((GAP, top + height - TEXT - GAP + 1), f"{sample.name}    {sample.words}", fill="black")
        top += height
    return sheet


def _heading(draw: ImageDraw.ImageDraw, caption: str) -> None:
    """What is shown, what the colours mean, what the columns are."""
    draw.text((GAP, 2), caption, fill="black")
    left = GAP
    legend = (("painted rightly", HIT), ("painted, and is ground", FALSE), ("object, and not painted", MISSED))
    for words, colour in legend:
        draw.rectangle((left, TEXT + 3, left + 9, TEXT + 12), fill=colour)
        draw.text((left + 14, TEXT + 2), words, fill="black")
        left += 30 + int(draw.textlength(words))
    for column, title in enumerate(COLUMNS):
        draw.text((GAP + column * (SIDE + GAP), 2 * TEXT + 2), title, fill="black")


def _pictures(sample: Sample) -> list[Image.Image]:
    """A sample's row, each picture at its size on the sheet."""
    truth = Image.fromarray(np.where(sample.truth, 255, 0).astype(np.uint8)).convert("RGB")
    errors = error_picture(sample.truth, sample.painted)
    smooth, sharp = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    row = ((sample.image, smooth), (truth, sharp), (overlay(sample.image, sample.painted), smooth), (errors, sharp))
    return [_fitted(picture, how) for picture, how in row]


def _fitted(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    """As large as fits into SIDE x SIDE, its shape kept."""
    scale = SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
