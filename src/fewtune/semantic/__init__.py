"""Semantic segmentation: images with masks of several classes, cross-entropy + soft Dice, mean IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from fewtune.config import Recipe
from fewtune.errors import Progress
from fewtune.kinds import MASK_RULES
from fewtune.segmentation import BATCH
from fewtune.training.task import Comparison, Evaluation, Loaded, Rows, Task
from fewtune.training.work import Described, Work

# What a task does is imported when it is done: training needs Lightning, and predicting does not.


def _images(recipe: Recipe) -> Mapping[str, Sized]:
    from fewtune.semantic.work import data_of

    return data_of(recipe).splits


def _prepare(recipe: Recipe) -> Work:
    from fewtune.semantic.work import prepare

    return prepare(recipe)


def _load(path: Path, progress: Progress | None = None, backbone: Described | None = None) -> Loaded:
    from fewtune.semantic.predict import load

    return load(path, progress, backbone)


def _evaluate(data: str, *, batch_size: int | None = None, **options: Any) -> Evaluation:
    from fewtune.semantic.evaluate import evaluate

    return evaluate(data, batch_size=batch_size or BATCH, **options)


def _predict(delta: Any, images: list[Path], *, batch_size: int | None = None, **options: Any) -> Rows:
    from fewtune.semantic.predict import predict

    return predict(delta, images, batch_size=batch_size or BATCH, **options)


def _recognises(path: Path) -> bool:
    from fewtune.semantic.evaluate import recognises

    return recognises(path)


def _compare(first: Path, second: Path) -> Comparison:
    from fewtune.semantic.evaluate import compare

    return compare(first, second)


SEMANTIC = Task(
    "semantic-segmentation",
    "miou",
    _images,
    _prepare,
    _load,
    _evaluate,
    _predict,
    _recognises,
    _compare,
    draws=True,
    pipeline="image-segmentation",
    rules=MASK_RULES,
)
