"""Classification: labelled images, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewtune.kinds import Rules
from fewtune.plugins import later
from fewtune.training.task import Answer, Task, splits_of

if TYPE_CHECKING:  # what is named below, so that the import contracts see it
    from fewtune.classification import evaluate, loaded, predict, work  # noqa: F401

BATCH = 32
"""Images at a time where nothing else is asked for."""


def _answer(logits: Tensor, class_names: Sequence[str], metadata: Mapping[str, Any]) -> Answer:
    probabilities = logits.float().softmax(-1).tolist()
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return Answer((class_names[best],), dict(zip(class_names, probabilities, strict=True)))


def _right(row: Mapping[str, str]) -> float:
    return float(row["label"] == row["prediction"])


# What a task does is imported when it is done: training needs Lightning, and predicting does not.
CLASSIFICATION = Task(
    "classification",
    "accuracy",
    images=splits_of("fewtune.classification.work:data_of"),
    prepare=later("fewtune.classification.work:prepare"),
    load=later("fewtune.classification.loaded:load_classifier"),
    evaluate=later("fewtune.classification.evaluate:evaluate", batch_size=BATCH),
    predict=later("fewtune.classification.predict:predict", batch_size=BATCH),
    recognises=later("fewtune.classification.evaluate:recognises"),
    compare=later("fewtune.classification.evaluate:compare"),
    answer=_answer,
    by_image=_right,
    rules=Rules(("supcon", "cross_entropy"), one_label=True),
)
