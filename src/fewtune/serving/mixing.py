"""One forward pass for images of several tasks: each module that tasks change is run once a task, on its images.

All else of the network (attention, norms, activations, whatever the tasks leave alone) runs once, on the whole batch.
A changed weight is copied once a batch, and each task's values are written into that copy and taken out again in
turn: a batch costs the products of the plain model and no more, however many input channels a task's connections
touch, where a correction added to a product with the backbone's weights would cost up to as much again. The backbone's
own weights are only read, and each product is the very one that the task applied alone makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewtune.quantised import dequantised
from fewtune.serving.changes import Change, HeldTask, read, write
from fewtune.serving.holders import Holder, replaced
from fewtune.serving.probe import Split, Splits

Rows = Sequence[tuple[HeldTask, int]]
"""The tasks of a batch that is sorted by task, and how many images each has."""
Scratch = dict[Holder, Tensor]
"""Copies of weights; between two tasks they hold the backbone's own numbers."""


class Workspace:
    """Memory for the copy of one weight at a time, kept from pass to pass: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def copy_of(self, weight: Tensor) -> Tensor:
        """Valid until the next call."""
        memory = self._memory
        if memory.numel() < weight.numel() or (memory.dtype, memory.device) != (weight.dtype, weight.device):
            memory = self._memory = weight.new_empty(weight.numel())
        return memory[: weight.numel()].view(weight.shape).copy_(weight)


@dataclass(frozen=True, eq=False)
class Changed:
    """A module that is run once a task.

    ``tensors``: what tasks change of it and is held by it, or by modules within it that are never called themselves
    (their weights are used by its own code): the tensor's name in the model, by holder.
    """

    module: nn.Module
    split: Split
    tensors: Mapping[Holder, str]

    def by_task(self, task: HeldTask) -> dict[Holder, Change]:
        return {holder: task.changes[name] for holder, name in self.tensors.items() if name in task.changes}


def changed_modules(
    model: nn.Module, holders: Mapping[str, Sequence[Holder]], splits: Splits, names: Sequence[str]
) -> list[Changed] | str:
    """The modules to be run once a task where tasks change these tensors; or the name of one that no module fits.

    Each is the module that holds the tensor, or the nearest one around it that can be split.
    """
    modules = dict(model.named_modules())
    place = {module: name for name, module in modules.items()}
    tensors: dict[nn.Module, dict[Holder, str]] = {}
    for name in names:
        for holder in holders.get(name, ()):
            module = holder.module
            while module is not model and module not in splits:
                module = modules[place[module].rpartition(".")[0]]
            if module is model:
                return name
            tensors.setdefault(module, {})[holder] = name
    return [Changed(module, splits[module], held) for module, held in tensors.items()]


class MixedPass:
    """A forward pass over images of several tasks."""

    def __init__(self, model: nn.Module, changed: Sequence[Changed], rows: Rows, workspace: Workspace) -> None:
        self.model, self.changed, self.workspace = model, changed, workspace
        self.rows: Rows = rows
        """Of the images that are being run: a module that is run once a task narrows them to that task's."""
        self.scratch: Scratch | None = None
        """Shared by the tasks within a module that is run once a task."""

    def __call__(self, images: Tensor) -> Any:
        """What the model returns for images sorted by task, [B, ...]; shorter logits are padded with -inf."""
        # A module's `forward` is replaced for the time of the pass only: at all others the model is a plain one.
        try:
            for changed in self.changed:
                vars(changed.module)["forward"] = self._forward(changed)
            return self.model(images)
        finally:
            for changed in self.changed:
                vars(changed.module).pop("forward", None)

    def _forward(self, changed: Changed) -> Callable[..., Any]:
        original = changed.module.forward
        linear = type(changed.module).forward is nn.Linear.forward and _alike(changed, self.rows)

        def forward(*args: Any, **kwargs: Any) -> Any:
            scratch: Scratch = {} if self.scratch is None else self.scratch
            if len(self.rows) == 1:
                return self._of_task(changed, original, self.rows[0], scratch, args, kwargs)
            if linear and not torch.is_autocast_enabled(args[0].device.type):
                return _linear(changed, args[0], self.rows, self.workspace)
            return self._by_task(changed, original, scratch, args, kwargs)

        return forward

    def _by_task(self, changed: Changed, forward: Callable[..., Any], scratch: Scratch, args: Any, kwargs: Any) -> Any:
        """The module once for each task, on that task's part of all that holds images."""
        leaves, structure = tree_flatten((args, kwargs))
        given, self.scratch = self.scratch, scratch
        outputs = []
        try:
            for row, images in zip(self.rows, _parts(self.rows), strict=True):
                some = [images(x) if h else x for x, h in zip(leaves, changed.split.arguments, strict=True)]
                some_args, some_kwargs = tree_unflatten(some, structure)
                outputs.append(tree_flatten(self._of_task(changed, forward, row, scratch, some_args, some_kwargs)))
        finally:
            self.scratch = given
        joined = [
            _joined(parts) if holds else parts[0]
            for parts, holds in zip(zip(*(o[0] for o in outputs), strict=True), changed.split.outputs, strict=True)
        ]
        return tree_unflatten(joined, outputs[0][1])

    def _of_task(
        self,
        changed: Changed,
        forward: Callable[..., Any],
        row: tuple[HeldTask, int],
        scratch: Scratch,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """The module with one task's tensors, on images of that task alone."""
        outer, self.rows = self.rows, [row]
        try:
            with _task_tensors(changed, row[0], scratch) as tensors, replaced(tensors):
                return forward(*args, **kwargs)
        finally:
            self.rows = outer


@contextmanager
def _task_tensors(changed: Changed, task: HeldTask, scratch: Scratch) -> Iterator[dict[Holder, Tensor]]:
    """What a task makes of a module's tensors."""
    tensors: dict[Holder, Tensor] = {}
    undo: list[tuple[Tensor, Tensor, Tensor]] = []
    for holder, change in changed.by_task(task).items():
        if change.gaps is None:
            tensors[holder] = change.values
            continue
        weight, positions = holder.tensor, change.positions()
        if holder not in scratch:
            scratch[holder] = dequantised(weight).clone()
        undo.append((scratch[holder], positions, read(weight, positions)))
        write(scratch[holder], positions, change.values)
        tensors[holder] = scratch[holder]
    try:
        yield tensors
    finally:
        for copy, positions, values in undo:
            write(copy, positions, values)


def _linear(changed: Changed, x: Tensor, rows: Rows, workspace: Workspace) -> Tensor:
    """`nn.Linear` by task, each product written where it belongs: joining parts would copy the whole output."""
    module = changed.module
    assert isinstance(module, nn.Linear)
    original, bias = dequantised(module.weight).detach(), module.bias
    names = {holder.attribute: name for holder, name in changed.tensors.items()}
    flat = x.reshape(-1, module.in_features)
    output = x.new_empty(len(flat), module.out_features)
    each, start = len(flat) // sum(count for _, count in rows), 0
    copy = workspace.copy_of(original) if "weight" in names else original
    for task, count in rows:
        part = slice(start * each, (start + count) * each)
        start += count
        change, new_bias = task.changes.get(names.get("weight", "")), task.changes.get(names.get("bias", ""))
        weight, b = copy if change is None else change.values, bias if new_bias is None else new_bias.values
        if change is not None and change.gaps is not None:
            positions, weight = change.positions(), copy
            write(copy, positions, change.values)
        if b is None:
            torch.mm(flat[part], weight.t(), out=output[part])
        else:
            torch.addmm(b, flat[part], weight.t(), out=output[part])
        if weight is copy and change is not None:
            write(copy, positions, read(original, positions))
    return output.view(*x.shape[:-1], module.out_features)


def _alike(changed: Changed, rows: Rows) -> bool:
    """Whether the tasks' tensors have the shapes of the backbone's own: those of heads may not."""
    whole = ((holder, change) for task, _ in rows for holder, change in changed.by_task(task).items())
    return all(change.gaps is not None or change.values.shape == holder.tensor.shape for holder, change in whole)


def _parts(rows: Rows) -> Iterator[Callable[[Tensor], Tensor]]:
    """For each task: from a tensor whose dimension 0 holds a batch image after image, that task's part."""
    batch, start = sum(count for _, count in rows), 0
    for _, count in rows:
        end = start + count

        def images(tensor: Tensor, start: int = start, end: int = end) -> Tensor:
            each = len(tensor) // batch
            return tensor[start * each : end * each]

        yield images
        start = end


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Along dimension 0; what differs in the last one (logits of different numbers of classes) is padded with -inf."""
    widest = max(part.shape[-1] for part in parts)
    padded = [nn.functional.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts]
    return torch.cat(padded)
