"""Test a task file on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fewtune.data import ImageData, Split, load_data
from fewtune.errors import DataError
from fewtune.metrics import Report, report
from fewtune.training.loaders import image_loader
from fewtune.training.probabilities import pick_device, prediction_rows, probabilities
from fewtune.training.task import load_task


@dataclass(frozen=True)
class Evaluation:
    """The measures, and one row of probabilities for every image."""

    report: Report
    rows: list[dict[str, Any]]


def evaluate(
    delta: str | Path,
    data: str,
    *,
    split: Literal["test", "val", "train", "all"] = "test",
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Callable[[str], None] | None = None,
    **data_options: Any,
) -> Evaluation:
    """Accuracy and its kin of a task file on labelled images (see `fewtune.metrics.report`).

    Args:
        delta: the task file; it names its backbone, its transform and its classes.
        data: as in `fewtune.data.load_data`, with its options in `data_options`.
        split: which images. A data set that is one undivided folder counts as "test" whole.

    Raises:
        DataError: the data has no such split, or classes that the task file does not know.
    """
    task = load_task(delta, progress)
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
