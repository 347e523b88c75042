"""The Lightning module of multi-label classification: binary cross-entropy of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.models import logits
from fewtune.multilabel.metrics import mean_average_precision
from fewtune.training.learner import Learner


class MultiLabelLearner(Learner):
    """Trains by binary cross-entropy, and keeps the epoch with the largest mean average precision of the validation
    images."""

    measure = "map"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return logits(self.outputs(images))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy with labels of 0 and 1 [B, C], a scalar."""
        scores = self(images)
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores))

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [B], and logits beside labels [B, 2 C]: the measure is one of all images together."""
        scores = self(images).float()
        loss = F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none").mean(dim=1)
        return loss, torch.cat([scores, labels.float()], dim=1)

    def overall(self, loss: Tensor, measured: Tensor) -> tuple[float, float]:
        """Mean loss, and mean average precision over the classes that any image has."""
        scores, labels = measured.chunk(2, dim=1)
        return float(loss.mean()), mean_average_precision(scores.sigmoid(), labels.long())
