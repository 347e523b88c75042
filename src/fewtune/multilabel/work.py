"""A prepared run of multi-label classification: images of any number of classes, and a backbone with a new head."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewtune.classification.work import ImageWork, checked
from fewtune.config import Recipe
from fewtune.data import ImageData
from fewtune.files import write_csv
from fewtune.multilabel.learner import MultiLabelLearner
from fewtune.multilabel.metrics import THRESHOLD, best_thresholds, report
from fewtune.multilabel.predict import prediction_rows
from fewtune.objectives import BinaryCrossEntropy, Objective, SupCon
from fewtune.training.run_folder import RunFolder
from fewtune.training.work import Work


@dataclass(frozen=True)
class MultiLabelWork(ImageWork):
    """Multi-label classification: labels are vectors of 0 and 1."""

    thresholds: tuple[float, ...] | None = field(default=None, kw_only=True)
    """The probability from which each class is predicted; None until the model is trained."""
    learner_class = MultiLabelLearner
    learner = Work.learner

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
        return replace(
            self, thresholds=best_thresholds(*self.predicted(self.data.val, "thresholds", of_logits=torch.sigmoid))
        )

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
        scores, labels = self.predicted(test, of_logits=torch.sigmoid)
        seconds = time.perf_counter() - begun
        write_csv(folder.predictions, prediction_rows(test.names, scores, names, self.thresholds, labels))
        return {"test_seconds": seconds, "test": report(scores, labels, names, self.thresholds).to_json()}


def prepare(recipe: Recipe) -> MultiLabelWork:
    """Load and check data and backbone; DataError or ModelError where they are not what a recipe needs."""
    return MultiLabelWork(recipe, **checked(recipe, ImageData.require_several_classes))
