"""Test a task file on labelled images."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fewtune.classification.loaded import load_classifier
from fewtune.classification.metrics import Report, report
from fewtune.classification.predict import prediction_rows, probabilities
from fewtune.data import ImageData, Split, load_data
from fewtune.errors import DataError, Progress
from fewtune.metrics import paired_bootstrap, percent
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.task import Comparison, Rows, columns

COLUMNS = {"file", "label", "prediction"}
"""Of a file of labelled predictions."""


@dataclass(frozen=True)
class Evaluation:
    """The measures, and one row of probabilities for every image."""

    report: Report
    rows: Rows

    def to_json(self) -> dict[str, Any]:
        """The measures."""
        return self.report.to_json()

    def tables(self) -> list[Rows]:
        """The measures of all images, then those of every class."""
        found = self.report
        whole = {
            "images": str(found.images),
            "accuracy, 95 % interval": f"{percent(asdict(found.accuracy))} %",
            "balanced accuracy": f"{100 * found.balanced_accuracy:.1f} %",
            "expected calibration error": f"{100 * found.calibration_error:.1f} %",
        }
        classes = zip(found.class_names, found.support, found.precision, found.recall, found.confusion, strict=True)
        return [
            [{"result": key, "": value} for key, value in whole.items()],
            [
                {"class": name, "images": str(n), "precision": f"{p:.3f}", "recall": f"{r:.3f}",
                 "predicted as each class": " ".join(map(str, row))}
                for name, n, p, r, row in classes
            ],
        ]  # fmt: skip


def evaluate(
    data: str,
    *,
    delta: str | Path,
    split: Literal["test", "val", "train", "all"] = "test",
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Progress | None = None,
    **data_options: Any,
) -> Evaluation:
    """Accuracy and its kin of a task file on labelled images (see `fewtune.classification.metrics.report`).

    Args:
        data: as in `fewtune.data.load_data`, with its options in `data_options`.
        delta: the task file; it names its backbone, its transform and its classes.
        split: which images. A data set that is one undivided folder counts as "test" whole.

    Raises:
        DataError: the data has no such split, or classes that the task file does not know.
    """
    task = load_classifier(delta, progress)
    images = load_data(data, progress=progress, **{"val_fraction": 0.0, **data_options})
    chosen = _by_task_labels(_chosen(images, split), images.class_names, task.class_names, delta)
    device = pick_device(accelerator)
    loader = image_loader(chosen.with_transform(task.transform), batch_size, workers=workers)
    found, labels = probabilities(task.backbone.model, loader, device, "evaluate")
    rows = prediction_rows(chosen.names, found, task.class_names, chosen.labels)
    return Evaluation(report(found, labels, task.class_names), rows)


def _chosen(images: ImageData, split: str) -> Split:
    undivided = images.val is None and images.test is None
    if split in images.splits:
        return images.splits[split]
    if undivided and split in ("test", "all"):
        return images.train
    raise DataError(f"{images.name} has no {split} split; it has {', '.join(images.splits)}")


def _by_task_labels(split: Split, class_names: tuple[str, ...], known: tuple[str, ...], delta: str | Path) -> Split:
    """The split with the task file's class numbers, matched by class name."""
    unknown = [name for name in class_names if name not in known]
    if unknown:
        raise DataError(
            f"the data has {len(class_names)} classes and {delta} knows {len(known)}; it does not know "
            f"{', '.join(unknown[:5])}"
        )
    numbers = [known.index(name) for name in class_names]
    return replace(split, labels=[numbers[label] for label in split.labels])


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
    if set(a) != set(b):
        only = sorted(set(a) ^ set(b))
        raise DataError(f"{first} and {second} are about different images; {only[0]} and {len(only) - 1} more differ")
    names = sorted(a)
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
