"""Multi-label classification: images of any number of classes, binary cross-entropy, mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

from fewtune.classification import BATCH, CLASSIFICATION
from fewtune.config import Recipe
from fewtune.errors import Progress
from fewtune.kinds import ONE_CLASS_ONLY, Rules
from fewtune.training.task import Answer, Comparison, Evaluation, Loaded, Rows, Task
from fewtune.training.work import Described, Work

# What a task does is imported when it is done: training needs Lightning, and predicting does not.


def _images(recipe: Recipe) -> Mapping[str, Sized]:
    return CLASSIFICATION.images(recipe)


def _prepare(recipe: Recipe) -> Work:
    from fewtune.multilabel.work import prepare

    return prepare(recipe)


def _load(path: Path, progress: Progress | None = None, backbone: Described | None = None) -> Loaded:
    from fewtune.multilabel.predict import load

    return load(path, progress, backbone)


def _evaluate(data: str, *, batch_size: int | None = None, **options: Any) -> Evaluation:
    from fewtune.multilabel.evaluate import evaluate

    return evaluate(data, batch_size=batch_size or BATCH, **options)


def _predict(delta: Any, images: list[Path], *, batch_size: int | None = None, **options: Any) -> Rows:
    from fewtune.multilabel.predict import predict

    return predict(delta, images, batch_size=batch_size or BATCH, **options)


def _recognises(path: Path) -> bool:
    from fewtune.multilabel.evaluate import recognises

    return recognises(path)


def _compare(first: Path, second: Path) -> Comparison:
    from fewtune.multilabel.evaluate import compare

    return compare(first, second)


def _answer(logits: Tensor, class_names: Sequence[str], metadata: Mapping[str, Any]) -> Answer:
    from fewtune.multilabel.predict import answer

    return answer(logits, class_names, metadata)


MULTI_LABEL = Task(
    "multi-label",
    "map",
    _images,
    _prepare,
    _load,
    _evaluate,
    _predict,
    _recognises,
    _compare,
    answer=_answer,
    rules=Rules(without=ONE_CLASS_ONLY, because="an image has any number of classes"),
)
