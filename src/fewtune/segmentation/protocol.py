"""`fit` of segmentation: the shared `fewtune.training.fit`, given images with masks and a segmenter.

Connections are chosen by the segmentation loss on training images alone; the epoch by the mean Dice of validation
images; the test images are scored once, at the end, at their own sizes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewtune.config import Recipe
from fewtune.data import MaskData, MaskSplit, load_masks
from fewtune.data.mask_transforms import Joint
from fewtune.methods import Tuner
from fewtune.objectives import Objective
from fewtune.segmentation.evaluation import score_masks
from fewtune.segmentation.learning import MaskLearner, SegmentationLoss
from fewtune.segmentation.models import Segmenter, load_segmenter
from fewtune.segmentation.task import CLASS_NAMES
from fewtune.training import protocol
from fewtune.training.folder import RunFolder
from fewtune.training.module import Learner
from fewtune.training.probabilities import pick_device, write_predictions
from fewtune.training.recompute import recompute_activations
from fewtune.training.task import describe_task
from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class MaskWork(Work):
    """Segmentation: images with masks, and a fresh segmenter."""

    data: MaskData
    backbone: Segmenter
    learner_class = MaskLearner

    classes = len(CLASS_NAMES)

    @property
    def loss(self) -> Objective:
        """The segmentation loss."""
        return SegmentationLoss()

    objective = loss

    @property
    def train(self) -> MaskSplit:
        """Training images as the recipe augments them."""
        return self.data.train.with_transform(
            Joint("flip" if self.recipe.augment == "flip" else "plain", self.backbone)
        )

    scored = train

    def evaluated(self, split: MaskSplit) -> MaskSplit:
        """Images of a split as they are."""
        return split.with_transform(Joint("plain", self.backbone))

    def learner(self, attach: Callable[[Learner], Tuner]) -> MaskLearner:
        """Trains on the training images as the recipe augments them, judges on the validation images as they are."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return MaskLearner(self.backbone.model, self.recipe, self.train, val, attach)

    def renewed(self, recipe: Recipe) -> MaskWork:
        """The same images with another fresh segmenter."""
        return replace(self, recipe=recipe, backbone=fresh_segmenter(recipe))

    def describe(self, **more: Any) -> dict[str, Any]:
        """With the mark by which a task file of segmentation is known."""
        return describe_task(self.recipe, self.backbone, CLASS_NAMES, task="segmentation", **more)

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """The measures of the test images, at their own sizes."""
        if self.data.test is None:
            return {}
        begun, recipe = time.perf_counter(), self.recipe
        report, rows = score_masks(
            self.backbone, self.data.test, pick_device(recipe.accelerator), batch_size=recipe.batch_size,
            workers=recipe.workers,
        )  # fmt: skip
        write_predictions(folder.predictions, rows)
        return {"test_seconds": time.perf_counter() - begun, "test": report.to_json()}


def fit(
    recipe: Recipe | None, out: str | Path, *, resume: bool = False, overwrite: bool = False, search: bool = False
) -> protocol.Result:
    """`fewtune.training.fit` for a recipe with task=segmentation; arguments and errors are the same."""
    options = {"resume": resume, "overwrite": overwrite, "search": search}
    return protocol.fit(recipe, out, prepared=prepare, **options)


def prepare(recipe: Recipe) -> MaskWork:
    """Load and check images, masks and segmenter; DataError or ModelError where they are not what a recipe needs."""
    data = load_masks(
        recipe.data,
        seed=recipe.seed,
        val_fraction=recipe.val_fraction,
        test_fraction=recipe.test_fraction,
        limit_train=recipe.limit_train,
        limit_test=recipe.limit_test,
    )
    data.check(decode=sum(map(len, data.splits.values())) <= protocol.DECODED_FIRST)
    if recipe.train_on == "train+val" and data.val is not None:
        data = replace(data, train=data.train.joined(data.val), val=None)
    log.info("%s", data.summary())
    return MaskWork(recipe, data, fresh_segmenter(recipe))


def fresh_segmenter(recipe: Recipe) -> Segmenter:
    """The recipe's segmenter; the same on every call."""
    segmenter = load_segmenter(
        recipe.model,
        image_size=recipe.image_size,
        pretrained=recipe.pretrained,
        architecture=recipe.arch,
        drop_path=recipe.drop_path,
        seed=recipe.seed,
        progress=log.info,
    )
    if recipe.checkpoint_activations:
        recompute_activations(segmenter.model, recipe.model)
    return segmenter
