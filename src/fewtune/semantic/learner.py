"""The Lightning module of semantic segmentation, and its loss, which also scores connections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewtune.losses import class_mask_loss
from fewtune.segmentation.sizes import at_size
from fewtune.semantic.metrics import by_class
from fewtune.training.learner import Learner


class ClassMaskLoss:
    """The objective of importance: cross-entropy + soft Dice of a batch of training images, mean over them."""

    def __init__(self, ignore: int) -> None:
        self.ignore = ignore

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        return class_mask_loss(at_size(model(inputs), labels.shape[-2:]), labels, self.ignore).mean()


class ClassMaskLearner(Learner):
    """Trains by cross-entropy + soft Dice, and keeps the epoch with the largest mean IoU of the validation images.

    Masks are compared at the size of the network's input here; the test is at the images' own.
    """

    measure = "miou"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, h, w]."""
        logits: Tensor = self.model(images)
        return logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar."""
        return class_mask_loss(at_size(self(images), labels.shape[-2:]), labels, self.recipe.ignore).mean()

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [B], and pixels by true and predicted class [B, classes, classes]: the measure is one of all images."""
        logits = at_size(self(images), labels.shape[-2:]).float()
        classes, predicted = logits.shape[1], logits.argmax(1)
        counts = []
        for painted, truth in zip(predicted, labels, strict=True):
            counted = truth != self.recipe.ignore
            places = truth[counted] * classes + painted[counted]
            counts.append(torch.bincount(places, minlength=classes**2).reshape(classes, classes))
        return class_mask_loss(logits, labels, self.recipe.ignore), torch.stack(counts).float()

    def overall(self, loss: Tensor, measured: Tensor) -> tuple[float, float]:
        """Mean loss, and mean IoU over the classes that any mask has, of all pixels together."""
        iou = torch.from_numpy(by_class(measured.double().sum(0).numpy())[0])
        return float(loss.mean()), float(iou.nanmean().nan_to_num(0.0))
