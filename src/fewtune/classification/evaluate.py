"""Test a task file on labelled images."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fewtune.classification.loaded import LoadedClassifier, load_classifier
from fewtune.classification.metrics import Report, report
from fewtune.classification.predict import prediction_rows, probabilities
from fewtune.data import ImageData, Split, load_data
from fewtune.data.load import limited
from fewtune.errors import DataError, Progress
from fewtune.metrics import paired_bootstrap, percent
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.seen import chosen
from fewtune.training.task import Comparison, Measured, Rows, Scored, columns, same_images

COLUMNS = {"file", "label", "prediction"}
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
    """Accuracy and its kin of a task file on labelled images (see `fewtune.classification.metrics.report`).

    Args:
        data: as in `fewtune.data.load_data`, with its options in `data_options`.
        delta: the task file; it names its backbone, its transform and its classes.
        split: which images. A data set that is one undivided folder is split as it was for training; other data
            counts as "test" whole (see `fewtune.training.seen.chosen`).
        include_training: score images that were trained on or chose the epoch too, and report them apart.

    Raises:
        DataError: the data has no such split, or classes that the task file does not know; or all its images were
            trained on.
    """
    task = load_classifier(delta, progress)
    device = pick_device(accelerator)

    def score(images: Split) -> tuple[Report, Rows]:
        loader = image_loader(images.with_transform(task.transform), batch_size, workers=workers)
        scores, labels = probabilities(task.backbone.model, loader, device, "evaluate")
        rows = prediction_rows(images.names, scores, task.class_names, images.labels)
        return report(scores, labels, task.class_names), rows

    return scored_as(
        score, task, data, split, ImageData.require_one_class, include_training=include_training, progress=progress,
        **data_options,
    )  # fmt: skip


def scored_as(
    score: Callable[[Split], tuple[Measured, Rows]],
    task: LoadedClassifier,
    data: str,
    split: str,
    suits: Callable[[ImageData], None],
    *,
    include_training: bool,
    progress: Progress | None,
    **data_options: Any,
) -> Scored:
    """What `score` says of the images that a task may be scored on, and, where asked for, of those that it has seen.

    Args:
        suits: raises DataError for data with labels of another kind.
        split, include_training, progress, data_options: as in `evaluate`.
    """

    def load(spec: str, **options: Any) -> ImageData:
        loaded = load_data(spec, **options)
        suits(loaded)
        return _by_task_labels(loaded, task.class_names)

    parts = chosen(
        load, data, split, task.delta.metadata, lambda images, limit: limited(data, images, limit),
        include_training=include_training, progress=progress, **data_options,
    )  # fmt: skip
    rows: Rows = []
    reports: list[Measured | None] = []
    for images, mark in ((parts.fresh, {"trained_on": 0}), (parts.trained, {"trained_on": 1})):
        if images is None:
            reports.append(None)
            continue
        measured, told = score(images)
        reports.append(measured)
        rows += [{**row, **mark} for row in told] if include_training else told
    return Scored(reports[0], rows, reports[1], parts.told)


def _by_task_labels(data: ImageData, known: tuple[str, ...]) -> ImageData:
    """The data with the task file's class numbers, matched by class name."""
    unknown = [name for name in data.class_names if name not in known]
    if unknown:
        raise DataError(
            f"the data has {len(data.class_names)} classes and the task knows {len(known)}; it does not know "
            f"{', '.join(unknown[:5])}"
        )
    numbers = [known.index(name) for name in data.class_names]
    parts: dict[str, Any] = {name: split.renumbered(numbers, len(known)) for name, split in data.splits.items()}
    return replace(data, class_names=known, **parts)


def read_hits(path: str | Path) -> dict[str, float]:
    """File name -> 1 or 0 for right or wrong, from a CSV file of labelled predictions.

    Raises DataError where the file is missing, or has not the columns file, label and prediction.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"there is no file of predictions at {path}") from None
    if not rows or not {"file", "label", "prediction"} <= set(rows[0]):
        raise DataError(f"{path} must be a CSV file with the columns file, label and prediction, as evaluate writes it")
    return {row["file"]: float(row["label"] == row["prediction"]) for row in rows}


def paired_hits(first: str | Path, second: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two files of predictions on the same images, in the same order; DataError where the images differ."""
    a, b = read_hits(first), read_hits(second)
    names = same_images(first, a, second, b)
    return np.array([a[name] for name in names]), np.array([b[name] for name in names])


def recognises(path: Path) -> bool:
    """Whether a CSV file holds labelled predictions of classes."""
    return set(columns(path)) >= COLUMNS


def compare(first: Path, second: Path) -> Comparison:
    """Accuracy of the second file of predictions minus the first's, on the same images (paired bootstrap)."""
    a, b = paired_hits(first, second)
    difference = paired_bootstrap(a, b)
    told = f"{percent(asdict(difference))} points"
    rows = [
        {"file": str(first), "accuracy, %": f"{100 * a.mean():.1f}"},
        {"file": str(second), "accuracy, %": f"{100 * b.mean():.1f}"},
        {"file": "second minus first, 95 % interval (paired bootstrap)", "accuracy, %": told},
    ]
    values = {"images": len(a), "first": a.mean(), "second": b.mean(), "difference": asdict(difference)}
    return Comparison({"accuracy": difference}, rows, values)
