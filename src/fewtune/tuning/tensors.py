"""What is trained of a layer's tensor: selected connections, or all of a half-precision tensor by a float32 master."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewtune.errors import TuningError
from fewtune.neurons import View
from fewtune.quantised import Overlay
from fewtune.tuning.functions import MasterWeight, SelectedWeight
from fewtune.tuning.ops import SelectedPlaces
from fewtune.tuning.units import Units

SELECTED = "_selected"
"""Suffix of the parameter that holds an attribute's selected values, [neurons, K], or [connections] where K differs."""
MASTER = "_master"
"""Suffix of the float32 parameter that trains a half-precision tensor whole."""


@dataclass(eq=False)
class Selected:
    """A weight of which some connections are trained.

    ``index``: where its values lie in the flattened stored weight, int64, in the shape of the values.
    ``units``: those of the values; None where the values are the weights themselves.
    """

    view: View
    places: SelectedPlaces
    index: Tensor
    units: Units | None = None

    suffix = SELECTED

    def weights(self, values: Tensor) -> Tensor:
        """The weight's entries that the values stand for; differentiable."""
        return values if self.units is None else self.units.weights(values)

    def values(self, weight: Tensor) -> Tensor:
        """The values that stand for the weight's entries at the selected places."""
        return self.read(weight) if self.units is None else self.units.values(self.read(weight))

    def write(self, values: Tensor, frozen: Tensor) -> None:
        """Writes what the values stand for into the frozen weight."""
        self.put(self.weights(values), frozen)

    def put(self, entries: Tensor, frozen: Tensor) -> None:
        """Writes entries into the frozen weight."""
        if isinstance(frozen, Overlay):
            frozen.write(self.index, entries)
        elif frozen.is_contiguous():
            frozen.view(-1).scatter_(0, self.index.view(-1), entries.to(frozen.dtype).view(-1))
        else:
            frozen[torch.unravel_index(self.index, frozen.shape)] = entries.to(frozen.dtype)

    def read(self, weight: Tensor) -> Tensor:
        """The weight's entries at the selected places, in the shape of the values."""
        return weight[torch.unravel_index(self.index, weight.shape)]

    def holds(self, values: Tensor, frozen: Tensor) -> bool:
        """Whether the frozen weight has what the values stand for."""
        return torch.equal(self.read(frozen), self.weights(values).to(frozen.dtype))

    def to(self, device: torch.device) -> Selected:
        units = None if self.units is None else self.units.to(device)
        return replace(self, places=self.places.to(device), index=self.index.to(device), units=units)

    def with_gradient(self, values: Tensor, frozen: Tensor) -> Tensor:
        """The frozen weight, whose gradient at the selected places goes to the values."""
        return SelectedWeight.apply(self.weights(values), frozen, self.index)


@dataclass(eq=False)
class Whole:
    """A half-precision tensor that is trained whole through a float32 parameter."""

    suffix = MASTER

    def write(self, values: Tensor, frozen: Tensor) -> None:
        frozen.copy_(values)

    def values(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def holds(self, values: Tensor, frozen: Tensor) -> bool:
        return torch.equal(frozen, values.to(frozen.dtype))

    def to(self, device: torch.device) -> Whole:
        return self

    def with_gradient(self, values: Tensor, frozen: Tensor) -> Tensor:
        """The frozen tensor, whose gradient goes to the master."""
        return MasterWeight.apply(values, frozen)


TunedTensor = Selected | Whole


def write_shard(tensor: TunedTensor, values: Any, frozen: Any) -> None:
    """`write_values` for one process's rows under FSDP2, where values and weight are sharded alike on dimension 0.

    Raises:
        TuningError: a ragged selection or a transposed weight, whose rows do not lie beside the weight's.
    """
    local = frozen.detach().to_local()
    if isinstance(tensor, Whole):
        tensor.write(values.detach().to_local(), local)
        return
    if tensor.places.k is None or tensor.view.kind != "rows":
        raise TuningError(
            "FSDP shards a weight and its selected values by rows, which needs the same number of connections in every "
            "neuron of a weight: select with granularity='neuron' and a whole k, and exclude transposed layers"
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(values.shape, values.device_mesh, values.placements)
    rows = slice(offset[0], offset[0] + shape[0])
    index = tensor.index[rows] - offset[0] * tensor.view.fan_in
    entries = values.detach().to_local()
    entries = entries if tensor.units is None else tensor.units.rows(rows).weights(entries)
    local.view(-1)[index] = entries.to(local.dtype)
