"""The changes of a task as a bank holds them: values and indices in few bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.delta import Delta
from fewtune.neurons import Role
from fewtune.quantised import dequantised

GAP_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Change:
    """New numbers of one tensor.

    ``values``: [connections], or the whole tensor where ``gaps`` is None. ``gaps``: distances between consecutive flat
    positions in the stored tensor, in the smallest type that holds them: two bytes a connection as a rule, where
    positions would take eight.
    """

    values: Tensor
    gaps: Tensor | None

    def positions(self) -> Tensor:
        """Flat positions in the stored tensor, ascending, [connections]."""
        assert self.gaps is not None
        return self.gaps.cumsum(0, dtype=torch.int64)

    def written_into(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, in its own strides, with the new numbers in it."""
        if self.gaps is None:
            return self.values
        copy = dequantised(tensor).detach().clone()
        write(copy, self.positions(), self.values)
        return copy


def write(tensor: Tensor, positions: Tensor, values: Tensor) -> None:
    """Writes entries at flat positions (counted row by row in the tensor's shape), through the tensor's strides."""
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, positions, values)
    else:
        tensor[torch.unravel_index(positions, tensor.shape)] = values


def read(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries that `write` overwrites."""
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, positions)
    return tensor[torch.unravel_index(positions, tensor.shape)]


@dataclass(frozen=True, eq=False)
class HeldTask:
    """A task in memory, beside its backbone.

    Attributes:
        changes: tensor name -> what it becomes.
        head: those of the names that belong to the head; their shapes may be other than the backbone's own.
        classes: number of the head's outputs.
        metadata: of the task file.
    """

    changes: Mapping[str, Change]
    head: frozenset[str]
    classes: int
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, delta: Delta, tensors: Mapping[str, Tensor]) -> HeldTask:
        """From a task file, in the dtype and on the device of the backbone's ``tensors``."""
        any_float = next(t for t in tensors.values() if t.is_floating_point())
        changes: dict[str, Change] = {}
        for name, positions in delta.positions.items():
            like = tensors.get(name, any_float)
            values = delta.new(name).to(like.device, like.dtype)
            gaps = None
            if positions is not None:
                positions, order = positions.sort()
                values = values[order.to(values.device)]
                gaps = _smallest(positions.diff(prepend=positions.new_zeros(1))).to(values.device)
            changes[name] = Change(values, gaps)
        head = delta.selection().anatomy.named(Role.HEAD)
        classes = len(changes[head[-1]].values) if head else 0
        return cls(_packed(changes), frozenset(head), classes, delta.metadata)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the task file, or numbers where it names none."""
        return class_names(self.metadata, self.classes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all numbers held."""
        held = (t for change in self.changes.values() for t in (change.values, change.gaps) if t is not None)
        return sum(tensor.nbytes for tensor in held)


def class_names(metadata: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    return tuple(map(str, metadata.get("class_names") or range(classes)))


def _smallest(numbers: Tensor) -> Tensor:
    largest = int(numbers.max()) if numbers.numel() else 0
    return numbers.to(next(kind for kind in GAP_TYPES if largest <= torch.iinfo(kind).max))


def _packed(changes: Mapping[str, Change]) -> dict[str, Change]:
    """The same, as views of one allocation a dtype: hundreds of small ones would take half as much again."""
    values = _together(change.values for change in changes.values())
    gaps = _together(change.gaps for change in changes.values() if change.gaps is not None)
    return {n: Change(next(values), None if change.gaps is None else next(gaps)) for n, change in changes.items()}


def _together(tensors: Iterable[Tensor]) -> Any:
    """An iterator of equal tensors that share one allocation a dtype."""
    tensors = list(tensors)
    whole = {
        kind: torch.cat([t.reshape(-1) for t in tensors if t.dtype is kind]) for kind in {t.dtype for t in tensors}
    }
    start = dict.fromkeys(whole, 0)
    for tensor in tensors:
        kind, end = tensor.dtype, start[tensor.dtype] + tensor.numel()
        yield whole[kind][start[kind] : end].view(tensor.shape)
        start[kind] = end


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by their first names."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}
