"""Attached models under optimisers, by hand and by closure: the weights follow the values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lookahead
from torch import Tensor, nn

from attaching import (
    EXACT,
    assert_trains_alike,
    batch,
    choose,
    cross_entropy_step,
    largest_difference,
    same_bits,
    sgd,
    small_vit,
    state_of,
)
from fewtune.tuning import attach
from fewtune.tuning.reference import DenseMask

OPTIMIZERS = {
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "lookahead of timm": lambda p: Lookahead(torch.optim.SGD(p, lr=0.1), k=2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimisers(kind: str) -> None:
    assert_trains_alike(small_vit().double(), optimizer=OPTIMIZERS[kind], steps=5)


@pytest.mark.parametrize("positional", [True, False])
def test_lbfgs_sees_the_values_that_it_tries(positional: bool) -> None:
    """The closure is called many times within a step, each time with other values in the model."""
    model = small_vit().double()
    selection = choose(model)
    reference = copy.deepcopy(model)
    dense = DenseMask(reference, selection)
    tuner = attach(model, selection)

    def step(network: nn.Module, parameters: list, after: Callable[[], None]) -> None:
        optimizer = torch.optim.LBFGS(parameters, lr=1.0, max_iter=6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            images, labels = batch(0)
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            after()
            return loss

        optimizer.step(closure) if positional else optimizer.step(closure=closure)

    step(model, tuner.parameters(), lambda: None)
    step(reference, dense.parameters(), dense.mask_gradients)
    tuner.detach()
    assert largest_difference(model, reference) < 1e-6  # a line search amplifies rounding


def test_a_closure_goes_with_other_arguments_of_step() -> None:
    """Optimisers with a step(closure, something) of their own get all of it."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None, times: int = 1):  # type: ignore[override]
            for _ in range(times):
                super().step(closure)

    def trained(use: Callable[[Counting, Callable], None]) -> dict[str, Tensor]:
        model = small_vit().double()
        optimizer = Counting(attach(model, choose(model)).parameters(), lr=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(batch(0)[0]).square().mean()
            loss.backward()
            return loss

        use(optimizer, closure)
        return state_of(model)

    expected = trained(lambda o, c: [o.step(c), o.step(c)])
    assert same_bits(trained(lambda o, c: o.step(c, 2)), expected)
    assert same_bits(trained(lambda o, c: o.step(closure=c, times=2)), expected)


def test_any_way_of_changing_values_shows_after_sync() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    vector = torch.nn.utils.parameters_to_vector(tuner.parameters())
    torch.nn.utils.vector_to_parameters(vector + 1.0, tuner.parameters())
    tuner.sync()
    for name, places in tuner.selection.places.items():
        now = model.state_dict()[name].reshape(-1)[places.flat]
        assert torch.equal(now, tuner.named_parameters()[name].detach().reshape(-1))


def test_values_changed_by_hand_are_seen_by_the_next_forward() -> None:
    """A plain loop without an optimiser: nobody calls sync, and the model must not stay as it was."""
    model = small_vit().double()
    tuner = attach(model, choose(model))
    images, labels = batch(0)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, tuner.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(tuner.parameters(), gradients, strict=True):
                parameter -= 0.2 * gradient
    assert losses[0] > losses[1] > losses[2]
    with torch.no_grad():
        output = model(images)
        fresh = small_vit().double().train()
        fresh.load_state_dict(tuner.plain_state_dict())
        assert torch.equal(fresh(images), output)


def test_groups_added_to_an_optimizer_later() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    parameters = tuner.parameters()
    before = state_of(model)
    optimizer = torch.optim.SGD(parameters[:1], lr=0.1)
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.2})
    cross_entropy_step(model, 0)
    optimizer.step()
    for name in tuner.selection.places:
        assert not torch.equal(model.state_dict()[name], before[name]), name


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_of_the_model(to_none: bool) -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    cross_entropy_step(model, 0)
    model.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in tuner.parameters())


def test_an_optimizer_over_all_parameters_moves_only_the_selected_ones() -> None:
    model = small_vit()
    before = state_of(model)
    tuner = attach(model, choose(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for number in range(2):
        optimizer.zero_grad()
        cross_entropy_step(model, number)
        optimizer.step()
    tuner.detach()
    for name, places in tuner.selection.places.items():
        changed = (model.state_dict()[name] != before[name]).reshape(-1)
        changed[places.flat] = False
        assert not changed.any()


def test_param_groups() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    backbone, head = tuner.param_groups(lr=0.1, head_lr=0.5)
    assert (backbone["lr"], head["lr"]) == (0.1, 0.5)
    assert [id(p) for p in head["params"]] == [id(model.head._parameters[n]) for n in ("weight", "bias")]
    assert sum(p.numel() for g in (backbone, head) for p in g["params"]) == tuner.trained == tuner.selection.trained
    assert [g.get("lr") for g in tuner.param_groups()] == [None, None]
    assert [g["lr"] for g in tuner.param_groups(lr=0.3)] == [0.3, 0.3]
    torch.optim.Adam(tuner.param_groups(lr=0.1, head_lr=0.5))


def test_clipping_by_the_norm_of_what_is_trained() -> None:
    """The masked gradient has the compact one's norm, so that clipping means the same."""
    model = small_vit().double()
    selection = choose(model)
    reference = copy.deepcopy(model)
    dense, tuner = DenseMask(reference, selection), attach(model, selection)
    cross_entropy_step(model, 0)
    cross_entropy_step(reference, 0)
    dense.mask_gradients()
    ours = torch.nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
    theirs = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.05)
    assert torch.isclose(ours, theirs, rtol=EXACT)
    sgd(tuner.parameters()).step()
    sgd(dense.parameters()).step()
    tuner.detach()
    assert largest_difference(model, reference) < EXACT
