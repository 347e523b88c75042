"""The supervised contrastive loss (Eq. 2) and the losses of binary segmentation."""

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
        labels: [samples], a class each; or 0 and 1, [samples, classes], where a sample may have any number of classes.
            Samples are then positives of each other by the overlap of their classes, |both| / |either|, and a term
            weighs as much: with one class each this is the loss above.
        temperature: tau.
        base_temperature: tau_0, which only scales the loss.

    Returns:
        A scalar, in float32 at least.

    References:
        Khosla et al., Supervised Contrastive Learning, 2020 (L_out, Eq. 2 there).
    """
    if features.ndim != 2 or labels.ndim not in (1, 2) or labels.shape[:1] != features.shape[:1]:
        raise ImportanceError(
            f"the contrastive loss got features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected [samples, width], and [samples] or [samples, classes]"
        )
    wide = torch.promote_types(features.dtype, torch.float32)
    z = F.normalize(features.to(wide), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_probability = similarity - similarity.logsumexp(dim=1, keepdim=True)
    weights = _overlap(labels).to(wide).masked_fill(itself, 0.0)
    positives, anchors = weights.sum(1), (weights > 0).any(dim=1)
    terms = log_probability.masked_fill(weights == 0, 0.0) * weights
    per_anchor = terms.sum(1) / positives.where(anchors, 1.0)
    total = (per_anchor * anchors).sum() / anchors.sum().clamp(min=1)
    return -(temperature / base_temperature) * total


def _overlap(labels: Tensor) -> Tensor:
    """How far the classes of two samples are the same, 0 to 1, [samples, samples]."""
    if labels.ndim == 1:
        return labels[:, None] == labels[None, :]
    held = labels.to(torch.float32)
    both, counts = held @ held.T, held.sum(1)
    return both / (counts[:, None] + counts[None, :] - both).clamp(min=1)


def binary_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    r"""Binary cross-entropy of mask logits, mean over the pixels of each image.

    .. math:: -\frac{1}{hw} \sum_p [g_p \log \sigma(x_p) + (1 - g_p) \log (1 - \sigma(x_p))]

    Args:
        logits: x, [images, 1, h, w].
        masks: g in 0..1, of the same shape.

    Returns:
        [images], in float32 at least.

    Raises:
        ImportanceError: the shapes differ.
    """
    logits, masks = _mask_pair(logits, masks)
    return F.binary_cross_entropy_with_logits(logits, masks, reduction="none").flatten(1).mean(1)


def soft_iou_loss(logits: Tensor, masks: Tensor) -> Tensor:
    r"""One minus the intersection over union of the probabilities and the mask, of each image.

    .. math:: 1 - \frac{\sum_p s_p g_p}{\sum_p s_p + g_p - s_p g_p}, \quad s = \sigma(x)

    Pixels painted outside the mask stand in the union, so they cost. Where the mask is empty the loss is 1 whatever is
    painted, and its gradient is zero: cross-entropy alone then teaches.

    Args:
        logits: x, [images, 1, h, w].
        masks: g in 0..1, of the same shape.

    Returns:
        [images], in float32 at least.

    Raises:
        ImportanceError: the shapes differ.

    References:
        Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation, 2016.
    """
    logits, masks = _mask_pair(logits, masks)
    painted, masks = logits.sigmoid().flatten(1), masks.flatten(1)
    intersection = (painted * masks).sum(1)
    union = (painted + masks).sum(1) - intersection
    return 1 - intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """`binary_cross_entropy` + `soft_iou_loss` of each image, [images]; their mean is what selects and trains.

    Args:
        logits: [images, 1, h, w].
        masks: in 0..1, of the same shape.

    Raises:
        ImportanceError: the shapes differ.
    """
    return binary_cross_entropy(logits, masks) + soft_iou_loss(logits, masks)


def _mask_pair(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 4 or logits.shape[1] != 1 or logits.shape != masks.shape:
        raise ImportanceError(
            f"a segmentation loss got logits of shape {tuple(logits.shape)} and masks of shape {tuple(masks.shape)}; "
            "expected [images, 1, h, w] for both"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide), masks.to(wide)
