"""The Lightning module of segmentation, and its loss, which also scores connections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewtune.losses import segmentation_loss
from fewtune.segmentation.metrics import THRESHOLD
from fewtune.segmentation.sizes import at_size
from fewtune.training.learner import Learner


class SegmentationLoss:
    """The objective of importance: binary cross-entropy + soft IoU of a batch of training images, mean over them."""

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        return segmentation_loss(at_size(model(inputs), labels.shape[-2:]), labels).mean()


class MaskLearner(Learner):
    """Trains by the segmentation loss, and keeps the epoch with the largest mean Dice of the validation images.

    Masks are compared at the size of the network's input here; the test is at the images' own.
    """

    measure = "dice"

    def forward(self, images: Tensor) -> Tensor:
        """Mask logits [B, 1, h, w]."""
        return self.model(images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar."""
        return segmentation_loss(at_size(self(images), labels.shape[-2:]), labels).mean()

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and Dice of every image, [B]."""
        logits = at_size(self(images), labels.shape[-2:]).float()
        return segmentation_loss(logits, labels), mask_dice(logits, labels)


def mask_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of the masks at probability 0.5, [B]; 1 where mask and truth are both empty. As `metrics.dice`."""
    painted = (logits.sigmoid() >= THRESHOLD).flatten(1)
    truth = masks.flatten(1) > 0.5
    hits, both = (painted & truth).sum(1), painted.sum(1) + truth.sum(1)
    return torch.where(both > 0, 2 * hits / both.clamp(min=1), torch.ones_like(hits, dtype=torch.float32))
