"""Score masks at the images' own sizes: of a task file, or of a pretrained segmenter as it is (zero-shot)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from fewtune.data import MaskSplit, load_masks
from fewtune.data.mask_sets import limited_masks
from fewtune.errors import ConfigError, DataError, Progress
from fewtune.methods import load_task_file
from fewtune.metrics import Interval, paired_bootstrap
from fewtune.segmentation.loaded import load_tuned_segmenter
from fewtune.segmentation.metrics import NAMES, THRESHOLD, MaskReport, interval_rows, mask_report, measure
from fewtune.segmentation.models import Segmenter, load_segmenter
from fewtune.segmentation.predict import probability_maps
from fewtune.segmentation.sheet import draw_sheet, of_object
from fewtune.training.loaders import pick_device
from fewtune.training.seen import chosen
from fewtune.training.task import Comparison, Scored, columns, same_images

ROUNDED = 8
"""Digits of the measures of an image in a file."""


@dataclass(frozen=True, kw_only=True)
class MaskEvaluation(Scored):
    """The mean measures, one row of measures for every image, and what scored them."""

    titles: ClassVar = ("images", "images that were trained on")

    segmenter: Segmenter
    split: MaskSplit

    def draw(self, count: int, path: Path, accelerator: str = "auto") -> None:
        """Write a sheet of the `count` images with the lowest Dice: image, truth, prediction, errors (PNG)."""
        from fewtune.data.masks import save_png

        rows = sorted(self.rows, key=lambda row: row["dice"])[:count]
        mean = sum(row["dice"] for row in self.rows) / len(self.rows)
        caption = f"the worst {len(rows)} of {len(self.rows)} images; mean Dice {mean:.3f}"
        save_png(draw_worst(self.segmenter, self.split, rows, caption, accelerator), path)


def evaluate(
    data: str,
    *,
    delta: str | Path | None = None,
    model: str | None = None,
    split: Literal["test", "val", "train", "all"] = "test",
    batch_size: int = 1,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Progress | None = None,
    image_size: int | None = None,
    architecture: str | None = None,
    include_training: bool = False,
    **data_options: Any,
) -> MaskEvaluation:
    """The six measures of `fewtune.segmentation.metrics`, per image, then their means with bootstrap intervals.

    Args:
        data: as in `load_masks`, with its options in `data_options`.
        delta: the task file; or
        model: an untouched pretrained segmenter, as in `load_segmenter`, at `image_size`.
        split: which images. A data set without a test and a validation split is split as it was for training; other
            data counts as "test" whole (see `fewtune.training.seen.chosen`).
        include_training: score images that were trained on or chose the epoch too, and report them apart.

    Raises:
        ConfigError: neither or both of delta and model.
        DataError: the data has no such split, or an image or mask is not good.
    """
    if (delta is None) == (model is None):
        raise ConfigError("give a task file (--delta), or a pretrained segmenter (--model) to score as it is")
    metadata = load_task_file(delta).metadata if delta is not None else {}
    parts = chosen(
        load_masks, data, split, metadata, limited_masks, include_training=include_training, progress=progress,
        **data_options,
    )  # fmt: skip
    if delta is not None:
        segmenter = load_tuned_segmenter(delta, progress).segmenter
    else:
        segmenter = load_segmenter(model or "", image_size=image_size, architecture=architecture, progress=progress)
    device = pick_device(accelerator)
    scored = {
        name: score_masks(segmenter, images, device, batch_size=batch_size, workers=workers)
        for name, images in (("fresh", parts.fresh), ("trained", parts.trained))
        if images is not None
    }
    fresh, trained = scored.get("fresh"), scored.get("trained")
    rows = (fresh or trained or (None, []))[1]
    images = parts.fresh or parts.trained
    assert images is not None
    reports = fresh[0] if fresh else None, trained[0] if trained else None
    return MaskEvaluation(reports[0], rows, reports[1], parts.told, segmenter=segmenter, split=images)


def score_masks(
    segmenter: Segmenter, split: MaskSplit, device: torch.device, *, batch_size: int = 1, workers: int = 0
) -> tuple[MaskReport, list[dict[str, Any]]]:
    """The report, and one row an image: file and its measures."""
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "text": "score"}
    maps = probability_maps(segmenter, split.images, device, **options)
    measures = [measure(probabilities, split.mask(index)) for index, probabilities in enumerate(maps)]
    rows = [
        {"file": name, **{key: round(value, ROUNDED) for key, value in asdict(one).items()}}
        for name, one in zip(split.names, measures, strict=True)
    ]
    return mask_report(measures), rows


def draw_worst(
    segmenter: Segmenter, split: MaskSplit, rows: Sequence[Mapping[str, Any]], caption: str, accelerator: str = "auto"
) -> Image.Image:
    """The sheet of some scored images, in the order of `rows` (file, dice, iou)."""
    places = {name: index for index, name in enumerate(split.names)}
    order = [places[row["file"]] for row in rows]
    maps = probability_maps(segmenter, [split.images[i] for i in order], pick_device(accelerator))
    samples = []
    for row, index, probabilities in zip(rows, order, maps, strict=True):
        words = f"Dice {float(row['dice']):.3f}   IoU {float(row['iou']):.3f}"
        painted = probabilities >= THRESHOLD
        samples.append(of_object(row["file"], split.image(index), split.mask(index), painted, words))
    return draw_sheet(samples, caption)


def compare(first: Path, second: Path) -> Comparison:
    """Mean of the second file's measures minus the first's, on the same images, with paired bootstrap intervals.

    Both are CSV files as `evaluate` and a run write them. DataError where the images differ or a column is missing.
    """
    a, b = read_measures(first), read_measures(second)
    names = same_images(first, a, second, b)
    differences = paired_differences([a[name] for name in names], [b[name] for name in names])
    values = {name: asdict(interval) for name, interval in differences.items()}
    return Comparison(differences, interval_rows(values, f"{second} minus {first}"), values)


def paired_differences(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Mean of second minus first of every measure; rows of the same images in the same order."""
    columns = {name: [np.array([float(row[name]) for row in rows]) for rows in (first, second)] for name in NAMES}
    return {name: paired_bootstrap(*pair) for name, pair in columns.items()}


def read_measures(path: str | Path) -> dict[str, dict[str, float]]:
    """File name -> measures, from a CSV file of scored masks; DataError where it is missing or is none."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"there is no file of scored masks at {path}") from None
    if not recognises(Path(path)):
        raise DataError(f"{path} must be a CSV file with the columns file, {', '.join(NAMES)}, as evaluate writes it")
    return {row["file"]: {name: float(row[name]) for name in NAMES} for row in rows}


def recognises(path: Path) -> bool:
    """Whether a CSV file has the columns of scored masks."""
    return {"file", *NAMES} <= set(columns(path))
