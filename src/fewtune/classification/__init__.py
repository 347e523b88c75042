"""Classification: labelled images, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

from fewtune.config import Recipe
from fewtune.errors import Progress
from fewtune.kinds import Rules
from fewtune.training.task import Answer, Comparison, Evaluation, Loaded, Rows, Task
from fewtune.training.work import Work

BATCH = 32
"""Images at a time where nothing else is asked for."""

# What a task does is imported when it is done: training needs Lightning, and predicting does not.


def _images(recipe: Recipe) -> Mapping[str, Sized]:
    from fewtune.classification.work import data_of

    return data_of(recipe).splits


def _prepare(recipe: Recipe) -> Work:
    from fewtune.classification.work import prepare

    return prepare(recipe)


def _load(path: Path, progress: Progress | None = None, backbone: Any = None) -> Loaded:
    from fewtune.classification.loaded import load_classifier

    return load_classifier(path, progress, backbone)


def _evaluate(data: str, *, batch_size: int | None = None, **options: Any) -> Evaluation:
    from fewtune.classification.evaluate import evaluate

    return evaluate(data, batch_size=batch_size or BATCH, **options)


def _predict(delta: Any, images: list[Path], *, batch_size: int | None = None, **options: Any) -> Rows:
    from fewtune.classification.predict import predict

    return predict(delta, images, batch_size=batch_size or BATCH, **options)


def _recognises(path: Path) -> bool:
    from fewtune.classification.evaluate import recognises

    return recognises(path)


def _compare(first: Path, second: Path) -> Comparison:
    from fewtune.classification.evaluate import compare

    return compare(first, second)


def _answer(logits: Tensor, class_names: Sequence[str], metadata: Mapping[str, Any]) -> Answer:
    found = logits.float().softmax(-1).tolist()
    best = max(range(len(found)), key=found.__getitem__)
    return Answer((class_names[best],), dict(zip(class_names, found, strict=True)))


def _right(row: Mapping[str, str]) -> float:
    return float(row["label"] == row["prediction"])


CLASSIFICATION = Task(
    "classification",
    "accuracy",
    _images,
    _prepare,
    _load,
    _evaluate,
    _predict,
    _recognises,
    _compare,
    answer=_answer,
    by_image=_right,
    rules=Rules(("supcon", "cross_entropy"), one_label=True),
)
