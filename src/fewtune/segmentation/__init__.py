"""Binary segmentation: images with masks, cross-entropy + soft IoU, mean Dice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewtune.kinds import MASK_RULES
from fewtune.plugins import later
from fewtune.training.task import Task, splits_of

if TYPE_CHECKING:  # what is named below, so that the import contracts see it
    from fewtune.segmentation import evaluate, loaded, predict, work  # noqa: F401

BATCH = 1
"""Images at a time where nothing else is asked for: they differ in size."""

# What a task does is imported when it is done: training needs Lightning, and predicting does not.
SEGMENTATION = Task(
    "segmentation",
    "dice",
    images=splits_of("fewtune.segmentation.work:data_of"),
    prepare=later("fewtune.segmentation.work:prepare"),
    load=later("fewtune.segmentation.loaded:load_tuned_segmenter"),
    evaluate=later("fewtune.segmentation.evaluate:evaluate", batch_size=BATCH),
    predict=later("fewtune.segmentation.predict:predict", batch_size=BATCH),
    recognises=later("fewtune.segmentation.evaluate:recognises"),
    compare=later("fewtune.segmentation.evaluate:compare"),
    untouched=True,
    draws=True,
    pipeline="image-segmentation",
    by_image=lambda row: float(row["dice"]),
    rules=MASK_RULES,
)
