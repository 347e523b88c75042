"""Binary segmentation: images with masks, cross-entropy + soft IoU, mean Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from fewtune.config import Recipe
from fewtune.errors import Progress
from fewtune.kinds import MASK_RULES
from fewtune.training.task import Comparison, Evaluation, Loaded, Rows, Task
from fewtune.training.work import Work

BATCH = 1
"""Images at a time where nothing else is asked for: they differ in size."""

# What a task does is imported when it is done: training needs Lightning, and predicting does not.


def _images(recipe: Recipe) -> Mapping[str, Sized]:
    from fewtune.segmentation.work import data_of

    return data_of(recipe).splits


def _prepare(recipe: Recipe) -> Work:
    from fewtune.segmentation.work import prepare

    return prepare(recipe)


def _load(path: Path, progress: Progress | None = None, backbone: Any = None) -> Loaded:
    from fewtune.segmentation.loaded import load_tuned_segmenter

    return load_tuned_segmenter(path, progress, backbone)


def _evaluate(data: str, *, batch_size: int | None = None, **options: Any) -> Evaluation:
    from fewtune.segmentation.evaluate import evaluate

    return evaluate(data, batch_size=batch_size or BATCH, **options)


def _predict(delta: Any, images: list[Path], *, batch_size: int | None = None, **options: Any) -> Rows:
    from fewtune.segmentation.predict import predict

    return predict(delta, images, batch_size=batch_size or BATCH, **options)


def _recognises(path: Path) -> bool:
    from fewtune.segmentation.evaluate import recognises

    return recognises(path)


def _compare(first: Path, second: Path) -> Comparison:
    from fewtune.segmentation.evaluate import compare

    return compare(first, second)


SEGMENTATION = Task(
    "segmentation",
    "dice",
    _images,
    _prepare,
    _load,
    _evaluate,
    _predict,
    _recognises,
    _compare,
    untouched=True,
    draws=True,
    pipeline="image-segmentation",
    by_image=lambda row: float(row["dice"]),
    rules=MASK_RULES,
)
