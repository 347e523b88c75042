"""The supervised contrastive loss (Eq. 2) and the losses of segmentation."""

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


def class_mask_loss(logits: Tensor, masks: Tensor, ignore: int = 255) -> Tensor:
    """`mask_cross_entropy` + `soft_dice_loss` of each image, [images]; their mean is what selects and trains.

    Args:
        logits: [images, classes, h, w].
        masks: numbers of classes, [images, h, w]; pixels of `ignore` count nowhere.

    Raises:
        ImportanceError: the shapes do not go together.
    """
    return mask_cross_entropy(logits, masks, ignore) + soft_dice_loss(logits, masks, ignore)


def mask_cross_entropy(logits: Tensor, masks: Tensor, ignore: int = 255) -> Tensor:
    """Cross-entropy, mean over the pixels of each image that count, [images]; 0 where none does.

    See `class_mask_loss` for the arguments.
    """
    logits, counted = _classes_and_mask(logits, masks, ignore)
    losses = F.cross_entropy(logits, masks.where(counted, -100).long(), reduction="none", ignore_index=-100)
    return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def soft_dice_loss(logits: Tensor, masks: Tensor, ignore: int = 255) -> Tensor:
    r"""One minus the soft Dice of each image, mean over the classes that its mask has, [images].

    .. math:: 1 - \frac{1}{|C|} \sum_{c \in C} \frac{2 \sum_p s_{cp} g_{cp}}{\sum_p s_{cp} + g_{cp}}

    with s the softmax of the logits, g 1 where the mask is of class c, and p the pixels that count. See
    `class_mask_loss` for the arguments.

    References:
        Milletari et al., V-Net, 2016 (there with squares below the line).
    """
    logits, counted = _classes_and_mask(logits, masks, ignore)
    truth = F.one_hot(masks.where(counted, 0).long(), logits.shape[1]).permute(0, 3, 1, 2) * counted[:, None]
    painted, truth = (logits.softmax(1) * counted[:, None]).flatten(2), truth.to(logits).flatten(2)
    both, sizes = (painted * truth).sum(2), (painted + truth).sum(2)
    present = truth.any(dim=2)
    scores = 2 * both / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    return (present * (1 - scores)).sum(1) / present.sum(1).clamp(min=1)


def _classes_and_mask(logits: Tensor, masks: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Logits in float32 at least, and which pixels count, bool [images, h, w]."""
    if logits.ndim != 4 or masks.shape != (logits.shape[0], *logits.shape[2:]):
        raise ImportanceError(
            f"a segmentation loss got logits of shape {tuple(logits.shape)} and masks of shape {tuple(masks.shape)}; "
            "expected [images, classes, h, w] and [images, h, w]"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), masks != ignore
