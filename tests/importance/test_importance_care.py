"""Importance leaves the model as it found it, and says what is wrong with what it was given."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune import CrossEntropy, gradient_importance
from fewtune.errors import ImportanceError, ModelError
from fewtune.importance import Scores
from fewtune.neurons import describe
from scored import LABELS, assert_close, batches, cross_entropy, dense_sums, images, net


def test_train_mode_uses_batch_statistics_and_keeps_none() -> None:
    model, data = net(), batches()
    model.drop.p = 0.0
    before = copy.deepcopy(model.state_dict())
    scores = gradient_importance(model, data, CrossEntropy(), train_mode=True)
    assert_same(model.state_dict(), before)
    assert_close(scores, dense_sums(copy.deepcopy(model).train(), data, cross_entropy))


def test_one_gradient_is_alive_at_a_time() -> None:
    model, data = net(), batches()
    seen: list[set[str]] = []

    def watched(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        def look(_: Tensor) -> None:
            seen.append({name for name, p in model.named_parameters() if p.grad is not None})

        output = model(inputs)
        output.register_hook(look)
        return F.cross_entropy(output, labels)

    gradient_importance(model, data, watched)
    assert seen == [set()] * 3
    assert all(p.grad is None for p in model.parameters())


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in state.items())


def found(model: nn.Module) -> list[Any]:
    """All that importance must not change, but for the state dict."""
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        torch.is_grad_enabled(),
    ]


def alike(first: Any, second: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, (Tensor, np.ndarray)):
        return bool((torch.as_tensor(first) == torch.as_tensor(second)).all())
    return bool(first == second)


def restless(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Uses up random numbers of all kinds."""
    random.random()
    np.random.rand()
    torch.rand(1)
    return F.cross_entropy(model(inputs), labels)


def failing(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    restless(model, inputs, labels).backward()
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("objective", [restless, failing])
def test_the_model_is_left_as_found(train_mode: bool, objective: Callable[..., Tensor]) -> None:
    model = net()
    model.train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before, state = found(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        inside = found(model)
        try:
            gradient_importance(model, batches(), objective, train_mode=train_mode)
        except RuntimeError as error:
            assert objective is failing, error  # noqa: PT017
        assert alike(found(model), inside)
    assert alike(found(model), before)
    assert_same(model.state_dict(), state)


class Counting(nn.Module):
    """Counts its calls in a buffer, which it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


def test_a_buffer_that_is_replaced_is_put_back() -> None:
    model = Counting()
    calls = model.calls
    gradient_importance(model, [(torch.randn(4, 4), LABELS[:4])], head=None)
    assert model.calls is calls
    assert float(calls) == 0


def test_nothing_is_left_behind_after_success() -> None:
    model = net()
    gradient_importance(model, batches())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nan_names_the_weights() -> None:
    data = batches()
    data[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ImportanceError, match=r"scores are not finite in conv\.weight, linear\.weight; look for NaN"):
        gradient_importance(net(), data)


def test_all_zero_names_the_weights() -> None:
    apart = [(images(0), torch.arange(6))]
    with pytest.raises(ImportanceError, match=r"all scores are zero in conv\.weight, linear\.weight: .* two views"):
        gradient_importance(net(), apart)


def test_many_broken_weights_are_counted() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    anatomy = describe(model, head=None)
    with pytest.raises(ImportanceError, match=r"0\.weight, 1\.weight, 2\.weight, 3\.weight, 4\.weight and 3 more"):
        Scores({name: torch.zeros(2, 2) for name in anatomy.views}, anatomy)


def test_negative_scores_are_refused() -> None:
    anatomy = describe(nn.Linear(2, 2), head=None)
    with pytest.raises(ImportanceError, match=r"scores are negative in weight; expected a modulus"):
        Scores({"weight": torch.tensor([[1.0, -1.0], [0.0, 2.0]])}, anatomy)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader yielded no batch"),
        ([torch.zeros(2, 3, 6, 6)], r"the loader yielded Tensor; expected \(images, labels\)"),
        ([(torch.zeros(2, 3, 6, 6), [0, 1])], "the loader yielded tuple"),
        ([(torch.zeros(1), torch.zeros(1), torch.zeros(1))], "the loader yielded tuple"),
        ([{"image": 1, "label": 2}], "the loader yielded dict"),
    ],
)
def test_loaders_that_yield_something_else(loader: Any, message: str) -> None:
    with pytest.raises(ImportanceError, match=message):
        gradient_importance(net(), loader)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, x, y: model(x).sum(1), "expected a scalar tensor"),
        (lambda model, x, y: 1.0, "the objective gave 1.0; expected a scalar tensor"),
        (lambda model, x, y: x.sum(), "does not depend on the model's weights"),
    ],
)
def test_objectives_that_are_none(objective: Any, message: str) -> None:
    with pytest.raises(ImportanceError, match=message):
        gradient_importance(net(), batches(), objective)


@pytest.mark.parametrize("option", [{"limit": 0}, {"limit": -1}, {"passes": 0}])
def test_numbers_that_are_none(option: dict[str, int]) -> None:
    (name,) = option
    with pytest.raises(ImportanceError, match=f"{name}=.*expected a whole number above 0"):
        gradient_importance(net(), batches(), **option)  # type: ignore[arg-type]


def test_a_model_of_a_head_alone() -> None:
    with pytest.raises(ImportanceError, match="no weight to select from outside its head"):
        gradient_importance(nn.Sequential(nn.Linear(3, 2)), batches(), head="0")
    with pytest.raises(ModelError, match="the model has no module 'haed' \(did you mean 'head'"):
        gradient_importance(net(), batches(), head="haed")


@pytest.mark.parametrize(
    "score",
    [
        lambda model: fewtune.gradient_importance(model, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))], head=None),
        lambda model: fewtune.magnitude_importance(model, head=None),
        lambda model: fewtune.random_importance(model, head=None),
    ],
)
def test_an_attached_model_is_refused(score: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    tuner = fewtune.attach(model, fewtune.select(fewtune.magnitude_importance(model, head=None), k=1))
    with pytest.raises(ModelError, match="detach it first"):
        score(model)
    tuner.detach()
    fewtune.magnitude_importance(model, head=None)
