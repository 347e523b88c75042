"""Quantised weights are refused by name, in importance, magnitude, attach and apply alike, and nothing outlives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fewtune
from fewtune import CrossEntropy, gradient_importance, magnitude_importance, random_importance, select
from fewtune.errors import DeltaError, FewtuneError, ImportanceError, TuningError
from fewtune.importance import Scores
from scored import Net, batches, net

REFUSED = r"linear\.weight is of torch\.(int8|uint8): .* load the backbone in float32.*roles=\{'linear\.weight'"


def quantised(dtype: torch.dtype = torch.int8) -> Net:
    """The model with one layer's weight in int8, or two 4-bit numbers a byte in uint8, as bitsandbytes keeps them."""
    model = net()
    shape = (8, 6) if dtype is torch.int8 else (24, 1)
    model.linear.weight = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize(
    "score",
    [
        lambda model: gradient_importance(model, batches(), CrossEntropy()),
        lambda model: gradient_importance(model, batches(), CrossEntropy(), passes=2),
        magnitude_importance,
        random_importance,
        lambda model: fewtune.difference_importance(model, net().state_dict()),
    ],
)
def test_scores_are_refused(score: Callable[[nn.Module], Scores], dtype: torch.dtype) -> None:
    with pytest.raises(ImportanceError, match=REFUSED):
        score(quantised(dtype))


def test_no_hook_outlives_a_refusal() -> None:
    """Also where a weight refuses in the midst of the registering: gradients of later training arrive."""
    model = net()
    before = [p.requires_grad for p in model.parameters()]

    class Refusing(nn.Parameter):
        def register_post_accumulate_grad_hook(self, hook: object) -> None:
            raise RuntimeError("no hooks here")

    model.linear.weight = Refusing(model.linear.weight.detach())
    with pytest.raises(RuntimeError, match="no hooks here"):
        gradient_importance(model, batches(), CrossEntropy())
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    images, labels = batches()[0]
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_quantised_weight_that_is_left_out_stays_frozen_and_the_rest_is_scored() -> None:
    model = quantised()
    scores = magnitude_importance(model, roles={"linear.weight": "other"})
    assert list(scores) == ["conv.weight"]


@pytest.mark.parametrize("call", ["attach", "apply"])
def test_attach_and_apply_are_refused(call: str) -> None:
    selection = select(random_importance(net()), k=1)
    tuner = fewtune.attach(net(), selection)
    delta = tuner.delta()
    model = quantised()
    flags = [p.requires_grad for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    expected: type[FewtuneError] = TuningError if call == "attach" else DeltaError
    with pytest.raises(expected, match=REFUSED):
        fewtune.attach(model, selection) if call == "attach" else delta.apply(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == kinds
