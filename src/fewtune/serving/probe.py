"""Tests which modules of a model can run on a part of a batch.

A module can where image i of a batch of B is the i-th of B equal parts of dimension 0 in all that it takes and gives:
[B, tokens, dim], [B, channels, height, width], Swin's [B * windows, tokens, dim]. Then running it once a task, on that
task's images, is the same as running it whole. Where the batch stands elsewhere, or images are mixed, it is not. No
table of classes says so: the model runs on three images together and on the second alone, and what every module took
and gave is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

IMAGES, MIDDLE = 3, 1
SAMPLE = 4096
"""Entries of a tensor that are compared, at most."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference, relative to the largest number, that counts as the same; in half precision, `HALF`."""
HALF = 0.1


@dataclass(frozen=True)
class Split:
    """Which of a module's arguments, and which of its outputs, flattened, hold images."""

    arguments: tuple[bool, ...]
    outputs: tuple[bool, ...]


Splits = Mapping[nn.Module, Split]


@dataclass(frozen=True)
class Sampled:
    """A tensor's first dimension, and some numbers of each of its equal parts along it."""

    size: int
    numbers: Tensor


Leaves = tuple[Sampled | None, ...]
"""Arguments or outputs, flattened; None for what is no tensor."""


@torch.inference_mode()
def find_splits(model: nn.Module, images: Tensor) -> dict[nn.Module, Split]:
    """The modules that can be run on some images of a batch at a time.

    Args:
        images: [IMAGES, ...], different from each other.
    """
    together, alone = _calls(model, images, IMAGES), _calls(model, images[MIDDLE : MIDDLE + 1], 1)
    result = {}
    for module, calls in alone.items():
        others = together.get(module, [])
        patterns = {_split(one, all_) for one, all_ in zip(calls, others, strict=False)}
        if len(others) == len(calls) and len(patterns) == 1 and (pattern := patterns.pop()) is not None:
            result[module] = pattern
    return result


def random_images(like: Tensor) -> Tensor:
    """[IMAGES, ...] of the shape, dtype and device of a batch; always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, *like.shape[1:], generator=generator).to(like.device, like.dtype)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= TOLERANCE.get(one.dtype, HALF) * one.abs().max())


def _calls(model: nn.Module, images: Tensor, parts: int) -> dict[nn.Module, list[tuple[Leaves, Leaves]]]:
    """What every module took and gave in one pass, call by call."""
    calls: dict[nn.Module, list[tuple[Leaves, Leaves]]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(module, []).append((_leaves((args, kwargs), parts), _leaves(output, parts)))

    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules() if m is not model]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _leaves(values: Any, parts: int) -> Leaves:
    return tuple(_sampled(leaf, parts) for leaf in tree_flatten(values)[0])


def _sampled(leaf: Any, parts: int) -> Sampled | None:
    if not isinstance(leaf, Tensor):
        return None
    size = leaf.shape[0] if leaf.dim() else 0
    rows = leaf.reshape(parts, -1) if size and size % parts == 0 else leaf.reshape(1, -1)
    return Sampled(size, rows[:, :: max(1, rows.shape[1] // SAMPLE)].clone())


def _split(alone: tuple[Leaves, Leaves], together: tuple[Leaves, Leaves]) -> Split | None:
    """How a call can be split; None where something in it neither holds images nor is the same for every batch."""
    sides = []
    for one, all_ in zip(alone, together, strict=True):
        holds = [_holds_images(a, b) for a, b in zip(one, all_, strict=False)]
        if len(one) != len(all_) or None in holds or not any(holds):
            return None
        sides.append(tuple(bool(each) for each in holds))
    return Split(*sides)


def _holds_images(alone: Sampled | None, together: Sampled | None) -> bool | None:
    """True: the middle part of the batch is what was there alone. False: the same for every batch. None: neither."""
    if alone is None or together is None:
        return False if alone is together else None
    if together.size == IMAGES * alone.size and len(together.numbers) == IMAGES:
        return True if close(alone.numbers[0], together.numbers[MIDDLE]) else None
    same = together.size == alone.size and torch.equal(alone.numbers.reshape(-1), together.numbers.reshape(-1))
    return False if same else None
