"""A larger selection in place of the attached one, while training goes on: values and optimiser state are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewtune.errors import TuningError
from fewtune.selection import Selection
from fewtune.tuning.tuner import Tuner

Lift = Callable[[str, Tensor, Tensor], Tensor]
"""Called as (name, a tensor like the old values, what new connections hold): the tensor like the new values."""


def lifting(before: Selection, after: Selection) -> Lift:
    """How tensors that go with the values of one selection become those of a larger one, old connections unchanged.

    Raises:
        TuningError: the larger selection lacks a connection or something else that the smaller one trains.
    """
    where = {}
    for name, places in before.places.items():
        there = after.places.get(name)
        if there is None or not bool(torch.isin(places.flat, there.flat, assume_unique=True).all()):
            raise TuningError(
                f"the selection cannot grow: connections of {name} that are trained are not in the new one"
            )
        where[name] = torch.searchsorted(there.flat, places.flat)
    if lost := {*before.whole, *before.head} - {*after.whole, *after.head}:
        raise TuningError(f"the selection cannot grow: {min(lost)} is trained and not in the new one")

    def lift(name: str, old: Tensor, new: Tensor) -> Tensor:
        if name not in where:
            return old
        lifted = new.detach().clone(memory_format=torch.contiguous_format)
        lifted.view(-1)[where[name].to(lifted.device)] = old.detach().reshape(-1).to(lifted)
        return lifted

    return lift


def lifted_values(values: Mapping[str, Tensor], fresh: Mapping[str, Tensor], lift: Lift) -> dict[str, Tensor]:
    """Values of the smaller selection by name -> those of the larger; new connections hold ``fresh``, their own."""
    return {name: lift(name, values[name], new) if name in values else new for name, new in fresh.items()}


def lifted_state(
    state: Mapping[str, Mapping[str, Tensor]], fresh: Mapping[str, Mapping[str, Tensor]], lift: Lift
) -> dict[str, Mapping[str, Tensor]]:
    """What `Tuner.state_dict` gave of the smaller selection -> that of the larger; what is new is as in ``fresh``."""
    of_connections = [group for group in ("values", "scales") if group in state]
    return {**state, **{group: lifted_values(state[group], fresh[group], lift) for group in of_connections}}


def grow(tuner: Tuner, select: Callable[[], Selection], attach: Callable[[Selection], Tuner]) -> tuple[Tuner, Lift]:
    """Detaches a tuner, attaches a larger selection in its place, and goes on with the values.

    What the weights were before stays what it was, so that the delta leads from the backbone to the tuned model.

    Args:
        tuner: attached; it is detached afterwards.
        select: the larger selection; called while the plain model holds the tuned weights.
        attach: the larger selection -> the new tuner; called when the model is as it was before any training.

    Returns:
        The new tuner, and how other tensors that go with the values become those of the new one.

    Raises:
        TuningError: the larger selection lacks something that is trained already.
    """
    state, delta, before = tuner.state_dict(), tuner.delta(), tuner.selection
    tuner.detach(keep=False)
    with delta.applied_to(tuner.model):
        larger = select()
    lift = lifting(before, larger)
    grown = attach(larger)
    grown.load_state_dict(lifted_state(state, grown.state_dict(), lift))
    return grown, lift


def grow_optimizer(optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], grown: Tuner, lift: Lift) -> None:
    """The same optimiser goes on with a grown tuner's parameters; the state of old connections is kept.

    A new connection begins with a mean gradient of 0. Its mean square (Adam's) begins at the mean of its layer's, not
    at 0: the layer's count of steps has long passed those in which Adam would make up for that, and its first steps
    would be several times as large as the learning rate.

    Args:
        optimizer: made from ``param_groups`` of the tuner before it grew.
        before: that tuner's parameters by name.
    """
    now = grown.named_parameters()
    for group, fresh in zip(optimizer.param_groups, grown.param_groups(), strict=True):
        group["params"] = fresh["params"]
    kept = {name: optimizer.state.pop(old) for name, old in before.items() if old in optimizer.state}
    for name, state in kept.items():
        old, new = before[name], now[name]

        def lifted(key: str, value: Any, name: str = name, old: Tensor = old, new: Tensor = new) -> Any:
            if not isinstance(value, Tensor) or value.shape != old.shape or old.ndim == 0:
                return value
            start = float(value.mean()) if key == "exp_avg_sq" else 0.0
            return lift(name, value, torch.full_like(new, start, dtype=value.dtype, requires_grad=False))

        optimizer.state[new] = {key: lifted(key, value) for key, value in state.items()}
