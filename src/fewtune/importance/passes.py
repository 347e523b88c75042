"""The pass over data that scores by gradients share: the model is left as found, one gradient is alive at a time."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.importance.backward import backward_at_once
from fewtune.objectives import Objective
from fewtune.sharded import gathered, is_sharded, processes, rows

Progress = Callable[[int, int | None], None]
"""Called as (batches done, batches in all or None)."""
Backward = Callable[[nn.Module, Any, Tensor], None]
"""Called as (model, inputs, labels): the backward pass of a batch."""
Settled = Callable[[int, Mapping[str, Tensor]], bool]
"""Called as (batches done, signed sums by weight); True ends the pass."""


def accumulate(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    weights: Mapping[str, Tensor],
    *,
    of: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    backward: Backward | None = None,
    limit: int | None = None,
    settled: Settled | None = None,
    store: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    r"""The sum over batches of a function of each weight's gradient.

    .. math:: s = \sum_b f(\partial L_b / \partial w)

    In float32 (float64 for float64 weights). Each gradient is freed as soon as it is added. To be called within
    `left_as_found`: it sets which parameters have gradients, and runs the model in the mode that it is in.

    Of a weight that FSDP has shared out it is this process's rows of the mean over the processes, from which
    `reduce_over_processes` makes what it makes of a whole one.

    Args:
        model: on its device; batches are moved there.
        loader: yields ``(images, labels)`` or ``((view1, view2), labels)``.
        objective: (model, inputs, labels) -> scalar.
        weights: the parameters whose gradients are summed, by name; those of all others are not formed.
        of: f, applied to a batch's gradient; the gradient itself where left out.
        backward: the backward pass of a batch, where it is not the objective's at once; it may add to a gradient
            several times, so it needs an f that is linear.
        limit: use this many batches at most.
        settled: asked after every batch, with the number of batches and the sums, whether that is enough.
        store: device of the sums; the weight's own where left out.
        progress: called after every batch.

    Raises:
        ImportanceError: an empty loader, one that yields something else, or an objective that gives no scalar.
    """
    with _summing(model, weights, of, store) as sums:
        enough = None if settled is None else partial(_asked, settled, _Whole(sums, weights))
        over_batches(model, loader, backward or partial(backward_at_once, objective), limit, enough, progress)
    return sums


@contextlib.contextmanager
def left_as_found(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """Restores modes, flags, gradients, buffers and random state, whatever happens within."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            for p, _, _ in flags:
                p.grad = None
            model.train(train_mode)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for p, requires_grad, grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # a module may have put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def reduce_over_processes(sums: dict[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Adds the sums of all processes of torch.distributed, so that every process selects the same.

    Rows of sums are put together in main memory, and made sums over the processes: FSDP takes means of gradients.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name, weight in weights.items():
            if is_sharded(weight):
                sums[name] = gathered(sums[name], weight).cpu() * processes(weight)
                continue
            total = sums[name].to(weight.device)  # where the processes can talk; sums may be stored elsewhere
            torch.distributed.all_reduce(total)
            sums[name] = total.to(sums[name].device)


@contextlib.contextmanager
def _summing(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    of: Callable[[Tensor], Tensor],
    store: torch.device | str | None,
) -> Iterator[dict[str, Tensor]]:
    """Within, every backward pass adds ``of(gradient)`` of each weight to the yielded sums and frees the gradient."""
    sums = {
        name: torch.zeros(rows(w).shape, dtype=torch.promote_types(w.dtype, torch.float32), device=store or w.device)
        for name, w in weights.items()
    }

    def add(name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            sums[name] += of(rows(weight.grad).to(sums[name]))
            weight.grad = None

    for p in model.parameters():
        p.requires_grad_(False)
    hooks = []
    try:  # from the first hook on: one that outlived a refusal would swallow the gradients of later training
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


class _Whole(Mapping[str, Tensor]):
    """Sums by weight, each put together of all processes' rows when it is asked for."""

    def __init__(self, sums: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.sums, self.weights = sums, weights

    def __getitem__(self, name: str) -> Tensor:
        return gathered(self.sums[name], self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def _asked(settled: Settled, sums: Mapping[str, Tensor], done: int) -> bool:
    return settled(done, sums)


def over_batches(
    model: nn.Module,
    loader: Iterable[Any],
    backward: Backward,
    limit: int | None,
    enough: Callable[[int], bool] | None,
    progress: Progress | None,
) -> None:
    """Calls `backward` on every batch, on the model's device; arguments as of `accumulate`."""
    device = next(model.parameters()).device
    length = len(loader) if isinstance(loader, Sized) else None
    total = limit if length is None else min(limit or length, length)
    done = 0
    for batch in islice(loader, limit):
        inputs, labels = _batch(batch, device)
        backward(model, inputs, labels)
        done += 1
        if progress is not None:
            progress(done, total)
        if enough is not None and enough(done):
            break
    if not done:
        raise ImportanceError("the loader yielded no batch; expected (images, labels) or ((view1, view2), labels)")


def _batch(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ImportanceError(
            f"the loader yielded {type(batch).__name__}; expected (images, labels) or ((view1, view2), labels)"
        )
    return _moved(batch[0], device), batch[1].to(device)


def _moved(inputs: Any, device: torch.device) -> Any:
    match inputs:
        case Tensor():
            return inputs.to(device)
        case tuple() | list():
            return tuple(_moved(x, device) for x in inputs)
        case Mapping():
            return {key: _moved(x, device) for key, x in inputs.items()}
        case _:
            return inputs
