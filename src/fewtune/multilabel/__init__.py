"""Multi-label classification: images of any number of classes, binary cross-entropy, mean average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewtune.classification import BATCH, CLASSIFICATION
from fewtune.kinds import ONE_CLASS_ONLY, Rules
from fewtune.plugins import later
from fewtune.training.task import Task

if TYPE_CHECKING:  # what is named below, so that the import contracts see it
    from fewtune.multilabel import evaluate, predict, work  # noqa: F401

# What a task does is imported when it is done: training needs Lightning, and predicting does not.
MULTI_LABEL = Task(
    "multi-label",
    "map",
    images=CLASSIFICATION.images,
    prepare=later("fewtune.multilabel.work:prepare"),
    load=later("fewtune.multilabel.predict:load"),
    evaluate=later("fewtune.multilabel.evaluate:evaluate", batch_size=BATCH),
    predict=later("fewtune.multilabel.predict:predict", batch_size=BATCH),
    recognises=later("fewtune.multilabel.evaluate:recognises"),
    compare=later("fewtune.multilabel.evaluate:compare"),
    answer=later("fewtune.multilabel.predict:answer"),
    rules=Rules(without=ONE_CLASS_ONLY, because="an image has any number of classes"),
)
