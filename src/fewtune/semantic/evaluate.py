"""Score masks of several classes at the images' own sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fewtune.data import load_class_masks
from fewtune.data.class_masks import ClassMaskSplit
from fewtune.data.mask_sets import limited_masks
from fewtune.errors import Progress
from fewtune.metrics import paired_bootstrap, percent
from fewtune.segmentation.models import Segmenter
from fewtune.segmentation.sheet import FALSE, HIT, Legend, draw_sheet
from fewtune.semantic.metrics import SemanticReport, confusion_of, dice_of_image, report
from fewtune.semantic.predict import class_maps, coloured, load, tinted
from fewtune.training.loaders import pick_device
from fewtune.training.seen import Chosen, chosen
from fewtune.training.task import Comparison, Rows, Scored, columns, read_rows, same_images

COLUMNS = {"file", "dice", "accuracy"}
"""Of a file of scored masks of several classes."""
LEGEND: Legend = (("the right class", HIT), ("another class", FALSE))
SKIPPED = (90, 90, 90)
"""Colour of pixels that do not count, RGB."""


@dataclass(frozen=True, kw_only=True)
class SemanticEvaluation(Scored):
    """The measures, one row for every image, and what scored them."""

    segmenter: Segmenter
    split: ClassMaskSplit
    class_names: tuple[str, ...]

    def draw(self, count: int, path: Path, accelerator: str = "auto") -> None:
        """Write a sheet of the `count` images with the lowest Dice: image, truth, prediction, errors (PNG)."""
        from fewtune.data.masks import save_png

        rows = sorted(self.rows, key=lambda row: row["dice"])[:count]
        caption = f"the worst {len(rows)} of {len(self.rows)} images by the mean Dice of their classes"
        save_png(draw_worst(self.segmenter, self.split, self.class_names, rows, caption, accelerator), path)


def evaluate(
    data: str,
    *,
    delta: str | Path,
    split: Literal["test", "val", "train", "all"] = "test",
    batch_size: int = 1,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Progress | None = None,
    include_training: bool = False,
    **data_options: Any,
) -> SemanticEvaluation:
    """IoU and Dice of a task file, by class and of all (see `fewtune.semantic.metrics`).

    Args:
        data: as in `fewtune.data.load_class_masks`, with its options in `data_options`.
        delta: the task file; it names its segmenter and its classes.
        split, include_training: as in `fewtune.segmentation.evaluate.evaluate`.

    Raises:
        DataError: the data has no such split or other classes, or an image or mask is not good.
    """
    task = load(delta, progress)
    metadata = task.delta.metadata
    read: Any = partial(load_class_masks, ignore=metadata["recipe"]["ignore"], names=metadata["class_names"])
    parts: Chosen[ClassMaskSplit] = chosen(
        read, data, split, metadata, limited_masks, include_training=include_training, progress=progress,
        **data_options,
    )  # fmt: skip
    device, names = pick_device(accelerator), tuple(metadata["class_names"])
    options = {"batch_size": batch_size, "workers": workers}
    fresh = score(task.segmenter, parts.fresh, names, device, **options) if parts.fresh is not None else None
    trained = score(task.segmenter, parts.trained, names, device, **options) if parts.trained is not None else None
    images = parts.fresh or parts.trained
    assert images is not None
    rows = (fresh or trained or (None, []))[1]
    reports = fresh[0] if fresh else None, trained[0] if trained else None
    return SemanticEvaluation(
        reports[0], rows, reports[1], parts.told, segmenter=task.segmenter, split=images, class_names=names
    )


def score(
    segmenter: Segmenter, split: ClassMaskSplit, names: tuple[str, ...], device: torch.device, **options: Any
) -> tuple[SemanticReport, Rows]:
    """The report, and one row an image: file, mean Dice of its classes, share of its pixels that are right."""
    maps = class_maps(segmenter, split.images, device, text="score", **options)
    confusions = [
        confusion_of(classes, split.mask(index), len(names), split.ignore) for index, classes in enumerate(maps)
    ]
    rows = [
        {
            "file": name,
            "dice": round(dice_of_image(one), 8),
            "accuracy": round(float(np.trace(one) / max(1, one.sum())), 8),
        }
        for name, one in zip(split.names, confusions, strict=True)
    ]
    return report(confusions, names), rows


def draw_worst(
    segmenter: Segmenter,
    split: ClassMaskSplit,
    names: Sequence[str],
    rows: Sequence[Any],
    caption: str,
    accelerator: str = "auto",
) -> Image.Image:
    """The sheet of some scored images, in the order of `rows` (file, dice)."""
    places = {name: index for index, name in enumerate(split.names)}
    order = [places[row["file"]] for row in rows]
    maps = class_maps(segmenter, [split.images[i] for i in order], pick_device(accelerator))
    samples = []
    for row, index, predicted in zip(rows, order, maps, strict=True):
        image, truth = split.image(index), split.mask(index)
        skipped = truth == split.ignore
        errors = np.where((predicted == truth)[..., None], HIT, FALSE).astype(np.uint8)
        errors[skipped] = SKIPPED
        shown = coloured(np.where(skipped, 0, truth))
        pictures = (image, shown, tinted(image, predicted), Image.fromarray(errors))
        held = ", ".join(names[number] for number in np.unique(truth[~skipped]))
        samples.append((f"{row['file']}    mean Dice {float(row['dice']):.3f}    truth: {held}", pictures))
    return draw_sheet(samples, caption, LEGEND)


def recognises(path: Path) -> bool:
    """Whether a CSV file has the columns of scored masks of several classes."""
    return set(columns(path)) == COLUMNS


def compare(first: Path, second: Path) -> Comparison:
    """Mean over images of the second file's Dice and share of right pixels minus the first's (paired bootstrap)."""
    one, two = (read_rows(path, recognises, COLUMNS) for path in (first, second))
    names = same_images(first, one, second, two)
    titles = {"dice": "mean Dice of an image's classes", "accuracy": "pixels that are right"}
    differences = {
        key: paired_bootstrap(*(np.array([float(rows[name][key]) for name in names]) for rows in (one, two)))
        for key in titles
    }
    values = {name: asdict(interval) for name, interval in differences.items()}
    title = f"{second} minus {first}"
    rows = [{title: titles[key], "in %, 95 % interval": percent(value)} for key, value in values.items()]
    return Comparison(differences, rows, values)
