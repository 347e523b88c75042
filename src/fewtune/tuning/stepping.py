"""Hooks on the steps of torch's optimisers: values that were stepped are written into their frozen weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Set
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fewtune.tuning.layers import SWAPPED, write_values


class Follower(Protocol):
    """Who is told of every step: the ids of the parameters that were stepped."""

    def after_step(self, stepped: Set[int]) -> None: ...


FOLLOWERS: weakref.WeakSet[Follower] = weakref.WeakSet()


def _sync_stepped(optimizer: Optimizer) -> set[int]:
    """Writes the values that an optimiser steps into their weights, wherever they live; returns what it steps."""
    stepped = {id(p) for p in chain.from_iterable(_parameters_of(optimizer))}
    for module in list(SWAPPED):
        swapped: Any = module
        tuned = swapped._fewtune.tuned
        if any(id(module._parameters[a + tensor.suffix]) in stepped for a, tensor in tuned.items()):
            write_values(module, changed=True)
    return stepped


def _parameters_of(optimizer: Optimizer) -> Iterable[list[Tensor]]:
    return (group["params"] for group in optimizer.param_groups)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = _sync_stepped(optimizer)
    if not torch.compiler.is_compiling():
        for follower in list(FOLLOWERS):
            follower.after_step(stepped)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """An optimiser that evaluates the model within a step (L-BFGS) must see the values that it is trying."""
    positional = len(args) > 1
    closure = args[1] if positional else kwargs.get("closure")
    if not callable(closure):
        return None

    def synced() -> Any:
        _sync_stepped(optimizer)
        return closure()

    if positional:
        return (args[0], synced, *args[2:]), kwargs
    return args, {**kwargs, "closure": synced}


def follow_optimizers() -> None:
    """From now on, in this process, weights follow the values that any optimiser of torch steps."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
