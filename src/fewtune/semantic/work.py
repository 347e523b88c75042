"""A prepared run of semantic segmentation: images with masks of several classes, and a segmenter of as many maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fewtune.config import Recipe
from fewtune.data import MaskData, MaskSplit, load_class_masks
from fewtune.data.class_masks import ClassMaskSplit
from fewtune.data.mask_transforms import Joint, Kind, classes_at
from fewtune.objectives import Objective
from fewtune.segmentation.work import MaskWork, checked, fresh_segmenter
from fewtune.semantic.evaluate import score
from fewtune.semantic.learner import ClassMaskLearner, ClassMaskLoss
from fewtune.training.task import Rows
from fewtune.training.work import division


@dataclass(frozen=True)
class SemanticWork(MaskWork):
    """Semantic segmentation: masks are class numbers."""

    learner_class = ClassMaskLearner

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The data's."""
        return self.data.class_names

    @property
    def loss(self) -> Objective:
        """Cross-entropy + soft Dice."""
        return ClassMaskLoss(self.recipe.ignore)

    def joint(self, kind: Kind) -> Joint:
        """Image and class numbers as the network takes them."""
        return Joint(kind, self.backbone, classes_at)

    def renewed(self, recipe: Recipe) -> SemanticWork:
        """The same images with another fresh segmenter."""
        return replace(self, recipe=recipe, backbone=fresh_segmenter(recipe, self.classes))

    def score(self, split: MaskSplit, device: torch.device, **options: Any) -> tuple[dict[str, Any], Rows]:
        """The measures of some images, and one row an image."""
        assert isinstance(split, ClassMaskSplit)
        report, rows = score(self.backbone, split, self.class_names, device, **options)
        return report.to_json(), rows


def data_of(recipe: Recipe) -> MaskData:
    """The images and masks that a recipe names; masks are opened only where no classes.txt names the classes."""
    return load_class_masks(recipe.data, ignore=recipe.ignore, **division(recipe))


def prepare(recipe: Recipe) -> SemanticWork:
    """Load and check images, masks and segmenter; DataError or ModelError where they are not what a recipe needs."""
    data = checked(recipe, data_of(recipe))
    return SemanticWork(recipe, data, fresh_segmenter(recipe, len(data.class_names)))
