"""The Lightning module of classification: cross-entropy with mixing, smoothing and class weights as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.config import Recipe
from fewtune.models import logits
from fewtune.objectives import Objective
from fewtune.training.learner import Learner


class Classifier(Learner):
    """Trains by cross-entropy, and keeps the epoch with the best validation accuracy."""

    measure = "accuracy"

    def __init__(
        self, model: nn.Module, recipe: Recipe, train: Any, val: Any, classes: int, attach: Callable[[Learner], Any]
    ) -> None:
        super().__init__(model, recipe, train, val, attach)
        self.mix = _mixing(recipe, classes)
        weights = _class_weights(train.labels, classes) if recipe.class_weights == "balanced" else None
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return logits(self.outputs(images))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, a scalar."""
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        self.logits = self(images)
        return F.cross_entropy(
            self.logits, targets, weight=self.class_weights, label_smoothing=self.recipe.label_smoothing
        )

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Plain cross-entropy, and 1 where the class is right, [B] each."""
        scores = self(images).float()
        return F.cross_entropy(scores, labels, reduction="none"), (scores.argmax(1) == labels).float()


def training_loss(recipe: Recipe, labels: Sequence[int], classes: int) -> Objective:
    """Cross-entropy as the classifier learns by it, of a batch that is not mixed."""
    weights = _class_weights(labels, classes) if recipe.class_weights == "balanced" else None

    def loss(model: nn.Module, images: Any, targets: Tensor) -> Tensor:
        weight = None if weights is None else weights.to(images.device)
        return F.cross_entropy(logits(model(images)), targets, weight=weight, label_smoothing=recipe.label_smoothing)

    return loss


def _mixing(recipe: Recipe, classes: int) -> Callable | None:
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019); one of them at random where both are on."""
    from torchvision.transforms import v2

    mixes: list[nn.Module] = []
    if recipe.mixup:
        mixes.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        mixes.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes) if mixes else None


def _class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """images / (classes * count): every class weighs the same in total; a class without images weighs 0."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return torch.where(counts > 0, len(labels) / (classes * counts.clamp(min=1)), 0.0)
