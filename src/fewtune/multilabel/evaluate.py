"""Test a task file on images that may have any number of classes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fewtune.classification.evaluate import scored_as
from fewtune.classification.predict import probabilities
from fewtune.data import ImageData, Split
from fewtune.errors import DataError, Progress
from fewtune.metrics import paired_bootstrap, percent
from fewtune.multilabel.metrics import MultiLabelReport, paired_map, report
from fewtune.multilabel.predict import SEPARATOR, load, prediction_rows, thresholds_of
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.task import Comparison, Rows, Scored, columns, read_rows, same_images

COLUMNS = {"file", "labels", "predictions", "f1"}
"""Of a file of labelled predictions."""


def evaluate(
    data: str,
    *,
    delta: str | Path,
    split: Literal["test", "val", "train", "all"] = "test",
    batch_size: int = 32,
    workers: int | None = None,
    accelerator: str = "auto",
    progress: Progress | None = None,
    include_training: bool = False,
    **data_options: Any,
) -> Scored:
    """Mean average precision and F1 of a task file (see `fewtune.multilabel.metrics.report`).

    The arguments and errors are those of `fewtune.classification.evaluate.evaluate`; the data is a CSV file of images
    of any number of classes.
    """
    task = load(delta, progress)
    device, names = pick_device(accelerator), task.class_names
    thresholds = thresholds_of(task.delta.metadata, len(names))

    def score(images: Split) -> tuple[MultiLabelReport, Rows]:
        loader = image_loader(images.with_transform(task.transform), batch_size, workers=workers)
        scores, labels = probabilities(task.backbone.model, loader, device, "evaluate", torch.sigmoid)
        rows = prediction_rows(images.names, scores, names, thresholds, labels)
        return report(scores, labels, names, thresholds), rows

    return scored_as(
        score, task, data, split, ImageData.require_several_classes, include_training=include_training,
        progress=progress, **data_options,
    )  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether a CSV file holds labelled predictions of any number of classes."""
    return set(columns(path)) >= COLUMNS


def compare(first: Path, second: Path) -> Comparison:
    """Mean average precision and F1 by image of the second file minus the first's, on the same images (bootstrap)."""
    one, two = (read_rows(path, recognises, COLUMNS) for path in (first, second))
    names = same_images(first, one, second, two)
    classes = [key for key in one[names[0]] if key.startswith("p(")]
    if classes != [key for key in two[names[0]] if key.startswith("p(")]:
        raise DataError(f"{first} and {second} are of different classes")
    held = [set(one[name]["labels"].split(SEPARATOR)) for name in names]
    truth = np.array([[key[2:-1] in labels for key in classes] for labels in held], dtype=np.int64)
    p, q = (np.array([[float(rows[name][key]) for key in classes] for name in names]) for rows in (one, two))
    a, b, gap = paired_map(p, q, truth)
    by_image = [np.array([float(rows[name]["f1"]) for name in names]) for rows in (one, two)]
    differences = {"map": gap, "f1_images": paired_bootstrap(*by_image)}
    title, share, f1 = "file", "mean average precision, %", "F1 by image, %"
    rows = [
        {title: str(first), share: f"{100 * a:.1f}", f1: f"{100 * by_image[0].mean():.1f}"},
        {title: str(second), share: f"{100 * b:.1f}", f1: f"{100 * by_image[1].mean():.1f}"},
        {title: "second minus first, 95 % interval (paired bootstrap)",
         share: f"{percent(asdict(gap))} points", f1: f"{percent(asdict(differences['f1_images']))} points"},
    ]  # fmt: skip
    values = {"images": len(names), **{name: asdict(one) for name, one in differences.items()}}
    return Comparison(differences, rows, values)
