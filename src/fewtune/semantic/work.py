"""A prepared run of semantic segmentation: images with masks of several classes, and a segmenter of as many maps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fewtune.config import Recipe
from fewtune.data import MaskData, MaskSplit, load_class_masks
from fewtune.data.class_masks import ClassMaskSplit
from fewtune.data.mask_transforms import Joint, classes_at
from fewtune.files import write_csv
from fewtune.methods import Tuner
from fewtune.objectives import Objective
from fewtune.segmentation.work import MaskWork, checked, fresh_segmenter
from fewtune.semantic.evaluate import score
from fewtune.semantic.learner import ClassMaskLearner, ClassMaskLoss
from fewtune.training.learner import Learner
from fewtune.training.loaders import pick_device
from fewtune.training.run_folder import RunFolder


@dataclass(frozen=True)
class SemanticWork(MaskWork):
    """Semantic segmentation: masks are class numbers."""

    learner_class = ClassMaskLearner  # type: ignore[assignment]

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The data's."""
        return self.data.class_names

    @property
    def loss(self) -> Objective:
        """Cross-entropy + soft Dice."""
        return ClassMaskLoss(self.recipe.ignore)

    @property
    def train(self) -> MaskSplit:
        """Training images as the recipe augments them, or under the user's own transform of (image, mask)."""
        kind: Any = "flip" if self.recipe.augment == "flip" else "plain"
        return self.data.train.with_transform(self.train_transform or Joint(kind, self.backbone, classes_at))

    scored = train

    def evaluated(self, split: MaskSplit) -> MaskSplit:
        """Images of a split as they are."""
        return split.with_transform(Joint("plain", self.backbone, classes_at))

    def learner(self, attach: Callable[[Learner], Tuner]) -> ClassMaskLearner:  # type: ignore[override]
        """Trains on the training images as the recipe augments them, judges on the validation images as they are."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return ClassMaskLearner(self.backbone.model, self.recipe, self.train, val, attach)

    def renewed(self, recipe: Recipe) -> SemanticWork:
        """The same images with another fresh segmenter."""
        return replace(self, recipe=recipe, backbone=fresh_segmenter(recipe, self.classes))

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """The measures of the test images, at their own sizes."""
        test, recipe = self.data.test, self.recipe
        if test is None:
            return {}
        assert isinstance(test, ClassMaskSplit)
        begun, options = time.perf_counter(), {"batch_size": recipe.batch_size, "workers": recipe.workers}
        report, rows = score(self.backbone, test, self.class_names, pick_device(recipe.accelerator), **options)
        write_csv(folder.predictions, rows)
        return {"test_seconds": time.perf_counter() - begun, "test": report.to_json()}


def data_of(recipe: Recipe) -> MaskData:
    """The images and masks that a recipe names; masks are opened only where no classes.txt names the classes."""
    return load_class_masks(
        recipe.data,
        ignore=recipe.ignore,
        seed=recipe.seed,
        val_fraction=recipe.val_fraction,
        test_fraction=recipe.test_fraction,
        limit_train=recipe.limit_train,
        limit_test=recipe.limit_test,
    )


def prepare(recipe: Recipe) -> SemanticWork:
    """Load and check images, masks and segmenter; DataError or ModelError where they are not what a recipe needs."""
    data = checked(recipe, data_of(recipe))
    return SemanticWork(recipe, data, fresh_segmenter(recipe, len(data.class_names)))
