"""Segmentation losses: by hand, per image, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fewtune.errors import ImportanceError
from fewtune.losses import binary_cross_entropy, segmentation_loss, soft_iou_loss


def test_by_hand() -> None:
    logits = torch.tensor([[[[0.0, math.log(3)]]], [[[-math.log(3), 0.0]]]])  # probabilities 1/2, 3/4; 1/4, 1/2
    masks = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 1.0]]]])
    assert binary_cross_entropy(logits, masks).tolist() == pytest.approx(
        [-(math.log(1 / 2) + math.log(3 / 4)) / 2, -(math.log(1 / 4) + math.log(1 / 2)) / 2]
    )
    assert soft_iou_loss(logits, masks).tolist() == pytest.approx([1 - 0.75 / 1.5, 1 - 0.75 / 2])
    both = binary_cross_entropy(logits, masks) + soft_iou_loss(logits, masks)
    assert torch.equal(segmentation_loss(logits, masks), both)


def test_an_image_does_not_change_its_neighbours_loss() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 1, 5, 7), (torch.rand(3, 1, 5, 7) > 0.5).float()
    alone = torch.cat([segmentation_loss(logits[i : i + 1], masks[i : i + 1]) for i in range(3)])
    assert torch.allclose(segmentation_loss(logits, masks), alone)
    expected = F.binary_cross_entropy_with_logits(logits, masks)
    assert binary_cross_entropy(logits, masks).mean() == pytest.approx(expected.item())


def test_false_positives_cost_and_are_unlearnt() -> None:
    """Each part, by itself, pushes a painted background pixel down."""
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2, :2] = 1
    for loss in (binary_cross_entropy, soft_iou_loss):
        logits = torch.where(masks > 0, 3.0, -3.0)
        wrong = logits.clone()
        wrong[..., 3, 3] = 3.0
        assert loss(wrong, masks).item() > loss(logits, masks).item() + 0.05
        wrong.requires_grad_()
        loss(wrong, masks).sum().backward()
        assert wrong.grad is not None
        assert wrong.grad[..., 3, 3] > 0
        assert (wrong.grad[masks > 0] < 0).all()


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_empty_and_full_masks_have_finite_losses_and_gradients(scale: float, truth: float) -> None:
    logits = (scale * torch.randn(2, 1, 4, 4)).requires_grad_()
    segmentation_loss(logits, torch.full((2, 1, 4, 4), truth)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    black = torch.full((1, 1, 4, 4), -300.0, requires_grad=True)  # probabilities that round to 0
    assert soft_iou_loss(black, torch.zeros(1, 1, 4, 4)).item() == 1
    assert soft_iou_loss(black, torch.ones(1, 1, 4, 4)).item() == 1


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 1, 512, 512, dtype=torch.bfloat16)
    masks = torch.zeros_like(logits)
    masks[..., :256] = 1
    assert segmentation_loss(logits, masks).dtype == torch.float32
    assert soft_iou_loss(logits, masks).item() == pytest.approx(2 / 3, rel=1e-5)
    assert segmentation_loss(logits.double(), masks.double()).dtype == torch.float64


@pytest.mark.parametrize("shapes", [((2, 1, 4, 4), (2, 1, 4, 5)), ((2, 2, 4, 4), (2, 2, 4, 4)), ((4, 4), (4, 4))])
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ImportanceError, match=r"expected \[images, 1, h, w\]"):
        segmentation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
