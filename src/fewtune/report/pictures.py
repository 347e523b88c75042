"""The pictures of a report: test images in which a run was wrong, where the images are still at hand."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from fewtune.errors import FewtuneError
from fewtune.report.reading import Run

SIDE = 176
MOST = 24
MOST_MASKS = 8


@dataclass(frozen=True)
class Picture:
    """A picture in the page: its bytes as a data URI, and what is said of it."""

    source: str
    name: str
    truth: str
    prediction: str
    probability: float


@dataclass(frozen=True)
class Gallery:
    """Pictures of the worst mistakes, or why there are none; `sheet` is that of masks."""

    pictures: tuple[Picture, ...] = ()
    sheet: str | None = None
    absent: str | None = None


def gallery(run: Run) -> Gallery:
    """The worst mistakes of a run; `absent` says why where its images cannot be had."""
    if not run.rows:
        return Gallery(absent="The run had no test images.")
    try:
        return _sheet(run) if run.draws_masks else _mistakes(run)
    except (FewtuneError, OSError) as error:
        return Gallery(absent=f"The images are not shown: {' '.join(str(error).split())}.")


def _mistakes(run: Run) -> Gallery:
    """Wrong predictions, the surest first; of any number of classes an image, those with the lowest F1 first."""
    truth, prediction = ("labels", "predictions") if run.multi_label else ("label", "prediction")
    wrong = [row for row in run.rows if row[truth] != row[prediction]]
    if not wrong:
        return Gallery(absent="Every test image is right.")
    test = run.images.test
    place = {} if test is None else {name: index for index, name in enumerate(test.names)}
    if test is None or any(row["file"] not in place for row in wrong):
        return Gallery(absent=f"The images are not shown: {run.recipe['data']} holds other images than it did.")
    pictures = []
    worst = sorted(
        wrong, key=(lambda row: float(row["f1"])) if run.multi_label else lambda row: -float(row["probability"])
    )
    for row in worst[:MOST]:
        source = data_uri(test.image(place[row["file"]]))
        told = row["file"], _listed(row[truth]), _listed(row[prediction]), float(row.get("probability", 0))
        pictures.append(Picture(source, *told))
    return Gallery(tuple(pictures))


def _listed(classes: str) -> str:
    return classes.replace(";", ", ") or "none"


def _sheet(run: Run) -> Gallery:
    """Image, truth, prediction and errors of the test images with the lowest Dice, drawn by the task file."""
    worst = sorted(run.rows, key=lambda row: float(row["dice"]))[:MOST_MASKS]
    caption = f"the {len(worst)} test images with the lowest Dice"
    drawn = _of_class_masks(run, worst, caption) if run.class_masks else _of_masks(run, worst, caption)
    if drawn is None:
        return Gallery(absent=f"The images are not shown: {run.recipe['data']} holds other images than it did.")
    return Gallery(sheet=data_uri(drawn, side=max(drawn.size)))


def _of_masks(run: Run, worst: list[dict[str, str]], caption: str) -> Image.Image | None:
    from fewtune.data import load_masks
    from fewtune.segmentation.evaluate import draw_worst
    from fewtune.segmentation.loaded import load_tuned_segmenter

    test = load_masks(run.recipe["data"], **run.drawn_by).test
    if test is None or any(row["file"] not in test.names for row in worst):
        return None
    return draw_worst(load_tuned_segmenter(run.path / "delta.safetensors").segmenter, test, worst, caption)


def _of_class_masks(run: Run, worst: list[dict[str, str]], caption: str) -> Image.Image | None:
    from fewtune.data import load_class_masks
    from fewtune.data.class_masks import ClassMaskSplit
    from fewtune.semantic.evaluate import draw_worst
    from fewtune.semantic.predict import load

    task = load(run.path / "delta.safetensors")
    known = {"ignore": run.recipe["ignore"], "names": task.delta.metadata["class_names"]}
    test = load_class_masks(run.recipe["data"], **known, **run.drawn_by).test
    if not isinstance(test, ClassMaskSplit) or any(row["file"] not in test.names for row in worst):
        return None
    return draw_worst(task.segmenter, test, known["names"], worst, caption)


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """An image as a JPEG within a data URI, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
