"""Two views of a batch are scored one after the other: the same gradient with half of what backward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fewtune
from fewtune import SupCon
from fewtune.errors import ImportanceError
from fewtune.objectives import pooled_features


@pytest.fixture(params=["test_vit", "test_efficientnet"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5).double()


def batches(count: int = 2, size: int = 6, views: int = 2) -> list[Any]:
    torch.manual_seed(1)
    images = [tuple(torch.randn(views, size, 3, 32, 32, dtype=torch.float64)) for _ in range(count)]
    return [(batch, torch.arange(size) % 3) for batch in images]


def at_once(model: nn.Module, images: Tensor) -> Tensor:
    """The model's own features, given by the user, so that nothing is known of them."""
    return pooled_features(model, images)


@pytest.mark.parametrize("views", [2, 3])
def test_the_same_scores(model: nn.Module, views: int) -> None:
    plain = fewtune.gradient_importance(model, batches(views=views), SupCon(features=at_once))
    scores = fewtune.gradient_importance(model, batches(views=views))
    assert list(scores) == list(plain)
    for name in plain:
        torch.testing.assert_close(scores[name], plain[name], rtol=1e-9, atol=1e-14)


def test_one_view_at_a_time_is_kept_for_backward(model: nn.Module) -> None:
    seen: list[tuple[int, bool]] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    fewtune.gradient_importance(model, batches(count=1))
    assert seen == [(6, False), (6, True), (6, True)]
    seen.clear()
    fewtune.gradient_importance(model, batches(count=1), train_mode=True)  # images of a batch know of each other
    assert seen == [(12, True)]
    seen.clear()
    fewtune.gradient_importance(model, batches(count=1), SupCon(features=at_once))
    assert seen == [(12, True)]


def test_a_single_view_and_refusals(model: nn.Module) -> None:
    single = [(images[0], labels) for images, labels in batches()]
    torch.testing.assert_close(
        dict(fewtune.gradient_importance(model, single)),
        dict(fewtune.gradient_importance(model, single, SupCon(features=at_once))),
        rtol=1e-9,
        atol=1e-14,
    )
    with pytest.raises(ImportanceError, match="no batch"):
        fewtune.gradient_importance(model, [])
    assert all(p.grad is None for p in model.parameters())
