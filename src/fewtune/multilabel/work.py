"""A prepared run of multi-label classification: images of any number of classes, and a backbone with a new head."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewtune.classification.predict import probabilities
from fewtune.classification.work import ImageWork, checked
from fewtune.config import Recipe
from fewtune.data import ImageData, Split
from fewtune.files import write_csv
from fewtune.methods import Tuner
from fewtune.multilabel.learner import MultiLabelLearner
from fewtune.multilabel.metrics import THRESHOLD, best_thresholds, report
from fewtune.multilabel.predict import prediction_rows
from fewtune.objectives import BinaryCrossEntropy, Objective, SupCon
from fewtune.training.learner import Learner
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.run_folder import RunFolder


@dataclass(frozen=True)
class MultiLabelWork(ImageWork):
    """Multi-label classification: labels are vectors of 0 and 1."""

    thresholds: tuple[float, ...] | None = field(default=None, kw_only=True)
    """The probability from which each class is predicted; None until the model is trained."""
    learner_class = MultiLabelLearner  # type: ignore[assignment]

    def learner(self, attach: Callable[[Learner], Tuner]) -> MultiLabelLearner:  # type: ignore[override]
        """Trains on the training images, judges on the validation images, where there are some."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return MultiLabelLearner(self.backbone.model, self.recipe, self.train, val, attach)

    @property
    def objective(self) -> Objective:
        """The contrastive loss by the overlap of labels, or binary cross-entropy, or the user's own."""
        if self.importance_objective is not None:
            return self.importance_objective
        return SupCon(self.recipe.temperature) if self.recipe.objective == "supcon" else BinaryCrossEntropy()

    @property
    def loss(self) -> Objective:
        """Binary cross-entropy."""
        return BinaryCrossEntropy()

    def settled(self) -> MultiLabelWork:
        """With the threshold of each class that has the largest F1 on validation images; 0.5 where there are none."""
        if self.data.val is None:
            return replace(self, thresholds=(THRESHOLD,) * self.classes)
        return replace(self, thresholds=best_thresholds(*self._scored(self.data.val, "thresholds")))

    def describe(self, **more: Any) -> dict[str, Any]:
        """As that of any run, with the thresholds."""
        return super().describe(thresholds=list(self.thresholds or ()), **more)

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """Report and predictions of the test images."""
        test, names = self.data.test, self.data.class_names
        if test is None:
            return {}
        assert self.thresholds is not None
        begun = time.perf_counter()
        scores, labels = self._scored(test, "test")
        seconds = time.perf_counter() - begun
        write_csv(folder.predictions, prediction_rows(test.names, scores, names, self.thresholds, labels))
        return {"test_seconds": seconds, "test": report(scores, labels, names, self.thresholds).to_json()}

    def _scored(self, split: Split, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        loader = image_loader(self.evaluated(split), self.recipe.batch_size, workers=self.recipe.workers)
        return probabilities(self.backbone.model, loader, pick_device(self.recipe.accelerator), text, torch.sigmoid)


def prepare(recipe: Recipe) -> MultiLabelWork:
    """Load and check data and backbone; DataError or ModelError where they are not what a recipe needs."""
    return MultiLabelWork(recipe, **checked(recipe, ImageData.require_several_classes))
