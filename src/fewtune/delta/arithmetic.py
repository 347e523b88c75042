"""Sums and means of tasks of one backbone, as a new delta.

Task arithmetic (Ilharco et al. 2023) on sparse changes: the result at a place is original + sum of weight * (new -
original) over the deltas that change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from fewtune.delta.checks import inventory
from fewtune.delta.delta import Delta
from fewtune.delta.entries import read, writable, write
from fewtune.delta.levels import made
from fewtune.errors import DeltaError
from fewtune.selection import Selection


@dataclass(frozen=True)
class Combined:
    """A new delta, and where those that it was made from met.

    Attributes:
        delta: the result.
        shared: connections that more than one of them changed.
        opposed: of these, the ones that some raised and others lowered.
    """

    delta: Delta
    shared: int
    opposed: int


def add(model: nn.Module, deltas: Sequence[Delta], head: Delta | None = None, **metadata: object) -> Combined:
    """The sum of what some tasks changed.

    Args:
        model: their backbone, plain; it is as before afterwards.
        deltas: two or more.
        head: whose head the result has; None takes the mean of all heads, which must then be of the same classes.
        metadata: joins that of the result, which is the first delta's (or that of `head`).

    Raises:
        DeltaError: fewer than two deltas, another backbone, or heads of different classes.
    """
    return _combined(model, deltas, 1.0, head, metadata)


def average(model: nn.Module, deltas: Sequence[Delta], head: Delta | None = None, **metadata: object) -> Combined:
    """The mean of what some tasks changed; a connection that a task left as it was counts with no change. See `add`."""
    return _combined(model, deltas, 1 / max(1, len(deltas)), head, metadata)


def _combined(
    model: nn.Module, deltas: Sequence[Delta], weight: float, head: Delta | None, metadata: dict[str, object]
) -> Combined:
    if len(deltas) < 2:
        raise DeltaError(f"got {len(deltas)} task; expected two or more to combine")
    for delta in deltas:
        with delta.applied_to(model):  # refuses another backbone
            pass
    heads = _heads(deltas, head)
    first = deltas[0] if head is None else head
    selection = reduce(or_, [first.selection(), *(delta.selection() for delta in deltas)])
    present, tuned = inventory(model), dict(heads)
    shared = opposed = 0
    for name in selection.places:
        tuned[name], met, against = _weight(present.parameters[name], name, selection, deltas, weight)
        shared, opposed = shared + met, opposed + against
    for name in selection.whole:
        tuned[name] = _moved(present.parameters[name], [d.whole[name] for d in deltas if name in d.whole], weight)
    buffers = {
        name: _moved(present.tensors[name], [d.buffers[name] for d in deltas if name in d.buffers], weight)
        for name in {name: None for delta in deltas for name in delta.buffers}
    }
    return Combined(made(model, selection, tuned, buffers, {**first.metadata, **metadata}), shared, opposed)


def _weight(
    weight: Tensor, name: str, selection: Selection, deltas: Sequence[Delta], factor: float
) -> tuple[Tensor, int, int]:
    """A weight with all changes, and how many of its places several deltas changed, and changed in opposition."""
    flat, view = selection.places[name].flat, selection.anatomy.views[name]
    index = view.stored_index(flat)
    original = read(weight, index).cpu().double()
    total, raised, lowered, count = (torch.zeros_like(original) for _ in range(4))
    for delta in deltas:
        places = delta.selection().places.get(name)
        if places is None:
            continue
        at = torch.searchsorted(flat, places.flat)
        change = delta.values[name].double() - original[at]
        total[at] += factor * change
        raised[at] += change > 0
        lowered[at] += change < 0
        count[at] += 1
    result = writable(weight, index)
    write(result, index, (original + total).to(result.dtype))
    return result, int((count > 1).sum()), int(((raised > 0) & (lowered > 0)).sum())


def _moved(original: Tensor, new: Sequence[Tensor], factor: float) -> Tensor:
    before = original.detach().cpu().double()
    total = before + factor * torch.stack([tensor.double() - before for tensor in new]).sum(0)
    return total.to(original.dtype)


def _heads(deltas: Sequence[Delta], head: Delta | None) -> dict[str, Tensor]:
    """The head of the result: a given one's, or the mean of all."""
    if head is not None:
        return {name: head.whole[name] for name in head.selection().head}
    classes = [delta.metadata.get("class_names") for delta in deltas]
    shapes = [delta.head_shapes for delta in deltas]
    if any(other != shapes[0] for other in shapes) or any(other != classes[0] for other in classes):
        raise DeltaError(
            "the tasks' heads are of different classes, so they have no mean: say whose head to take (--head-of FILE)"
        )
    return {
        name: torch.stack([delta.whole[name].double() for delta in deltas]).mean(0).to(deltas[0].whole[name].dtype)
        for name in shapes[0]
    }
