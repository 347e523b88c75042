"""A prepared run of segmentation: images with masks, and a segmenter.

Connections are chosen by the segmentation loss on training images alone; the epoch by the mean Dice of validation
images; the test images are scored once, at the end, at their own sizes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fewtune.config import Recipe
from fewtune.data import MaskData, MaskSplit, load_masks
from fewtune.data.mask_transforms import Joint, Kind
from fewtune.files import write_csv
from fewtune.objectives import Objective
from fewtune.segmentation.evaluate import score_masks
from fewtune.segmentation.learner import MaskLearner, SegmentationLoss
from fewtune.segmentation.loaded import CLASS_NAMES
from fewtune.segmentation.models import Segmenter, load_segmenter
from fewtune.training.images import Images
from fewtune.training.learner import Learner
from fewtune.training.loaders import pick_device
from fewtune.training.memory import recompute_activations
from fewtune.training.run_folder import RunFolder
from fewtune.training.task import Rows
from fewtune.training.work import DECODED_FIRST, Work, division

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class MaskWork(Work):
    """Segmentation: images with masks, and a fresh segmenter."""

    data: MaskData
    backbone: Segmenter
    learner_class: ClassVar[type[Learner]] = MaskLearner

    class_names = CLASS_NAMES

    @property
    def loss(self) -> Objective:
        """The segmentation loss."""
        return SegmentationLoss()

    @property
    def objective(self) -> Objective:
        """The same loss, or the user's own objective."""
        return self.importance_objective or self.loss

    @property
    def train(self) -> MaskSplit:
        """Training images as the recipe augments them, or under the user's own transform of (image, mask)."""
        usual = self.joint("flip" if self.recipe.augment == "flip" else "plain")
        return self.data.train.with_transform(self.train_transform or usual)

    scored = train

    def evaluated(self, split: Images) -> MaskSplit:
        """Images of a split as they are."""
        assert isinstance(split, MaskSplit)
        return split.with_transform(self.joint("plain"))

    def joint(self, kind: Kind) -> Joint:
        """Image and mask as the network takes them."""
        return Joint(kind, self.backbone)

    def renewed(self, recipe: Recipe) -> MaskWork:
        """The same images with another fresh segmenter."""
        return replace(self, recipe=recipe, backbone=fresh_segmenter(recipe))

    def untested(self) -> MaskWork:
        """Without the test images."""
        return replace(self, data=replace(self.data, test=None))

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """The measures of the test images, at their own sizes."""
        if self.data.test is None:
            return {}
        begun, recipe = time.perf_counter(), self.recipe
        options = {"batch_size": recipe.batch_size, "workers": recipe.workers}
        measures, rows = self.score(self.data.test, pick_device(recipe.accelerator), **options)
        write_csv(folder.predictions, rows)
        return {"test_seconds": time.perf_counter() - begun, "test": measures}

    def score(self, split: MaskSplit, device: torch.device, **options: Any) -> tuple[dict[str, Any], Rows]:
        """The measures of some images, and one row an image."""
        report, rows = score_masks(self.backbone, split, device, **options)
        return report.to_json(), rows


def data_of(recipe: Recipe) -> MaskData:
    """The images and masks that a recipe names, listed and not opened."""
    return load_masks(recipe.data, **division(recipe))


def prepare(recipe: Recipe) -> MaskWork:
    """Load and check images, masks and segmenter; DataError or ModelError where they are not what a recipe needs."""
    data = checked(recipe, data_of(recipe))
    return MaskWork(recipe, data, fresh_segmenter(recipe))


def checked(recipe: Recipe, data: MaskData) -> MaskData:
    """The data as the recipe trains on it; DataError where something is wrong with it."""
    data.check(decode=sum(map(len, data.splits.values())) <= DECODED_FIRST)
    if recipe.train_on == "train+val" and data.val is not None:
        data = replace(data, train=data.train.joined(data.val), val=None)
    log.info("%s", data.summary())
    return data


def fresh_segmenter(recipe: Recipe, classes: int = 1) -> Segmenter:
    """The recipe's segmenter, of so many maps of logits; the same on every call."""
    segmenter = load_segmenter(
        recipe.model,
        image_size=recipe.image_size,
        pretrained=recipe.pretrained,
        architecture=recipe.arch,
        drop_path=recipe.drop_path,
        seed=recipe.seed,
        quantise=recipe.quantise,
        classes=classes,
        progress=log.info,
    )
    if recipe.checkpoint_activations:
        recompute_activations(segmenter.model, recipe.model)
    return segmenter
