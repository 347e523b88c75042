"""The supervised contrastive loss (Eq. 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.errors import ImportanceError


def supervised_contrastive_loss(
    features: Tensor, labels: Tensor, temperature: float = 0.07, base_temperature: float = 0.07
) -> Tensor:
    r"""Supervised contrastive loss, "out" form, every sample an anchor (Eq. 2).

    .. math:: L = \frac{1}{|A|} \sum_{i \in A} \frac{\tau}{\tau_0} \frac{-1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp(z_i z_p / \tau)}{\sum_{a \ne i} \exp(z_i z_a / \tau)}

    with z the L2-normalised features, P(i) the other samples of i's class and A the anchors for which P(i) is not
    empty: an anchor without any positive has no term, and a batch without any gives zero.

    Args:
        features: [samples, width]; several views of an image are several samples of one label.
        labels: [samples].
        temperature: tau.
        base_temperature: tau_0, which only scales the loss.

    Returns:
        A scalar, in float32 at least.

    References:
        Khosla et al., Supervised Contrastive Learning, 2020 (L_out, Eq. 2 there).
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ImportanceError(
            f"the contrastive loss got features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected [samples, width] and [samples]"
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    z = F.normalize(features.to(wide), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_probability = similarity - similarity.logsumexp(dim=1, keepdim=True)
    positives = (labels[:, None] == labels[None, :]) & ~itself
    anchors = positives.any(dim=1)
    per_anchor = log_probability.masked_fill(~positives, 0.0).sum(1) / positives.sum(1).clamp(min=1)
    total = (per_anchor * anchors).sum() / anchors.sum().clamp(min=1)
    return -(temperature / base_temperature) * total
