"""Measures and losses of masks of several classes: scikit-learn's, torchmetrics', and their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_jaccard_index

from fewtune.errors import DataError, ImportanceError
from fewtune.losses import class_mask_loss, mask_cross_entropy, soft_dice_loss
from fewtune.semantic.metrics import confusion_of, dice_of_image, report

CLASSES, IGNORE = 4, 255


def made_up(images: int = 6) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions and truths of different sizes; the truth never has the last class, and ignores some pixels."""
    rng = np.random.default_rng(0)
    truth = [rng.integers(0, 3, (9 + i, 12)).astype(np.uint8) for i in range(images)]
    predicted = [np.where(rng.random(t.shape) < 0.7, t, rng.integers(0, 4, t.shape)).astype(np.uint8) for t in truth]
    for mask in truth:
        mask[:2, :3] = IGNORE
    return predicted, truth


def test_measures_equal_scikit_learns_and_torchmetrics() -> None:
    predicted, truth = made_up()
    got = report([confusion_of(p, t, CLASSES, IGNORE) for p, t in zip(predicted, truth, strict=True)], tuple("abcd"))
    p, y = (np.concatenate([one.ravel() for one in many]) for many in (predicted, truth))
    kept = y != IGNORE
    labels = list(range(CLASSES))
    assert np.array_equal(got.confusion, confusion_matrix(y[kept], p[kept], labels=labels))
    iou = jaccard_score(y[kept], p[kept], labels=labels, average=None)
    dice = f1_score(y[kept], p[kept], labels=labels, average=None)
    assert got.iou_by_class[:3] == pytest.approx(iou[:3])
    assert got.dice_by_class[:3] == pytest.approx(dice[:3])
    assert got.iou_by_class[3] is got.dice_by_class[3] is None
    assert got.miou.value == pytest.approx(iou[:3].mean())
    assert got.mdice.value == pytest.approx(dice[:3].mean())
    assert got.accuracy == pytest.approx((y == p)[kept].mean())
    options = {"num_classes": CLASSES, "average": "none", "ignore_index": IGNORE}
    theirs = multiclass_jaccard_index(torch.from_numpy(p).long(), torch.from_numpy(y).long(), **options)
    assert got.iou_by_class[:3] == pytest.approx(theirs[:3].tolist(), abs=1e-6)
    theirs = multiclass_f1_score(torch.from_numpy(p).long(), torch.from_numpy(y).long(), **options)
    assert got.dice_by_class[:3] == pytest.approx(theirs[:3].tolist(), abs=1e-6)
    for interval in (got.miou, got.mdice, got.dice):
        assert interval.low < interval.value < interval.high


def test_what_is_ignored_counts_nowhere() -> None:
    predicted, truth = made_up(1)
    other = predicted[0].copy()
    other[truth[0] == IGNORE] = 3
    one, two = (confusion_of(p, truth[0], CLASSES, IGNORE) for p in (predicted[0], other))
    assert np.array_equal(one, two)
    assert dice_of_image(confusion_of(predicted[0], np.full_like(truth[0], IGNORE), CLASSES, IGNORE)) == 1.0


def test_nothing_and_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="no predictions"):
        report([], ("a", "b"))
    with pytest.raises(DataError, match=r"expected \[H, W\]"):
        confusion_of(np.zeros((2, 3), int), np.zeros((3, 2), int), 2, IGNORE)
    with pytest.raises(ImportanceError, match=r"expected \[images, classes, h, w\]"):
        class_mask_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.long))


def test_the_loss_is_cross_entropy_and_soft_dice_of_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 2, (2, 5, 6), generator=generator)  # the last class is in no mask
    masks[0, :2] = IGNORE
    masks[1] = IGNORE  # an image in which nothing counts
    got = class_mask_loss(logits, masks, IGNORE)
    p, y = logits.softmax(1)[0][:, 2:], masks[0, 2:]
    entropy = torch.nn.functional.cross_entropy(logits[:1, :, 2:], y[None])
    dice = [2 * p[c][y == c].sum() / (p[c].sum() + (y == c).sum()) for c in (0, 1)]
    torch.testing.assert_close(mask_cross_entropy(logits, masks)[0], entropy)
    torch.testing.assert_close(soft_dice_loss(logits, masks)[0], 1 - (dice[0] + dice[1]) / 2)
    torch.testing.assert_close(got[0], entropy + 1 - (dice[0] + dice[1]) / 2)
    assert got[1] == 0
    got.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, :2].any()
    assert not logits.grad[1].any()
    assert logits.grad[0, :, 2:].all()
