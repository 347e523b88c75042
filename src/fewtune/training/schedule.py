"""Optimiser and learning rate of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from fewtune.config import Recipe
from fewtune.tuning.groups import ParamGroup


def optimizer_of(recipe: Recipe, groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """The recipe's optimiser over parameters in groups."""
    match recipe.optimizer:
        case "adam":
            return torch.optim.Adam(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
        case "sgd":
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """`learning_rate` of each group, from the peak that it has now, over so many steps."""
    warmup = steps * recipe.warmup // recipe.epochs

    def factor(peak: float) -> Callable[[int], float]:
        ends = {"start": recipe.warmup_lr, "end": recipe.min_lr}
        return lambda step: learning_rate(step, peak=peak, steps=steps, warmup=warmup, **ends) / peak

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, start: float = 1e-7, end: float = 1e-8) -> float:
    """Learning rate of `step` (from 0) out of `steps`.

    Linear from `start` at step 0 to `peak` at step `warmup`, then peak * cosine down to `end` at the last step
    (Loshchilov and Hutter 2017). A `peak` below `start` or `end` is kept as it is.
    """
    start, end = min(start, peak), min(end, peak)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2
