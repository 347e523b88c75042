"""The pictures: errors in their colours, overlays at the image's size, sheets of images of any shape."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fewtune.segmentation.predict import TINT, overlay
from fewtune.segmentation.sheet import FALSE, HIT, MISSED, SIDE, draw_sheet, error_picture, of_object


def test_errors_have_their_colours() -> None:
    truth, painted = np.zeros((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)
    truth[:, :4], painted[:, 2:5] = True, True
    pixels = np.asarray(error_picture(truth, painted))
    columns = [tuple(pixels[0, column]) for column in range(6)]
    assert columns[:5] == [MISSED, MISSED, HIT, HIT, FALSE]
    assert columns[5] not in (MISSED, HIT, FALSE)


def test_an_overlay_leaves_the_ground_as_it_is() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:7, 3:9] = True
    before, after = np.asarray(image), np.asarray(overlay(image, mask))
    assert (after[~mask] == before[~mask]).all()
    assert tuple(after[2, 5]) == TINT  # the edge
    assert (after[4, 5] != before[4, 5]).any()
    assert tuple(after[4, 5]) != TINT
    nothing = np.zeros_like(mask)
    assert (np.asarray(overlay(image, nothing)) == before).all()


def test_a_sheet_takes_images_of_any_shape() -> None:
    samples = []
    for height, width in ((30, 400), (300, 20), (1, 1)):
        mask = np.ones((height, width), dtype=bool)
        samples.append(of_object("name.png", Image.new("RGB", (width, height)), mask, mask, "Dice 1.000"))
    sheet = np.asarray(draw_sheet(samples, "caption"))
    assert sheet.shape[1] == 4 * SIDE + 5 * 6
    assert (sheet == HIT).all(-1).sum() > SIDE * 10  # the errors of all three are there, and all right
    assert not (sheet[60:] == FALSE).all(-1).any()
