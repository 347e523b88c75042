"""Semantic segmentation: images with masks of several classes, cross-entropy + soft Dice, mean IoU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewtune.kinds import MASK_RULES
from fewtune.plugins import later
from fewtune.segmentation import BATCH
from fewtune.training.task import Task, splits_of

if TYPE_CHECKING:  # what is named below, so that the import contracts see it
    from fewtune.semantic import evaluate, predict, work  # noqa: F401

# What a task does is imported when it is done: training needs Lightning, and predicting does not.
SEMANTIC = Task(
    "semantic-segmentation",
    "miou",
    images=splits_of("fewtune.semantic.work:data_of"),
    prepare=later("fewtune.semantic.work:prepare"),
    load=later("fewtune.semantic.predict:load"),
    evaluate=later("fewtune.semantic.evaluate:evaluate", batch_size=BATCH),
    predict=later("fewtune.semantic.predict:predict", batch_size=BATCH),
    recognises=later("fewtune.semantic.evaluate:recognises"),
    compare=later("fewtune.semantic.evaluate:compare"),
    draws=True,
    pipeline="image-segmentation",
    rules=MASK_RULES,
)
