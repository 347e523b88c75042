"""What is trained of a layer's tensor: selected connections, or all of a half-precision tensor by a float32 master."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewtune.errors import TuningError
from fewtune.neurons import View
from fewtune.tuning.functions import MasterWeight, SelectedWeight
from fewtune.tuning.ops import SelectedPlaces

SELECTED = "_selected"
"""Suffix of the parameter that holds an attribute's selected values, [neurons, K], or [connections] where K differs."""
MASTER = "_master"
"""Suffix of the float32 parameter that trains a half-precision tensor whole."""


@dataclass(eq=False)
class Selected:
    """A weight of which some connections are trained.

    ``index``: where its values lie in the flattened stored weight, int64, in the shape of the values.
    """

    view: View
    places: SelectedPlaces
    index: Tensor

    suffix = SELECTED

    def write(self, values: Tensor, frozen: Tensor) -> None:
        """Writes the values into the frozen weight."""
        if frozen.is_contiguous():
            frozen.view(-1).scatter_(0, self.index.view(-1), values.to(frozen.dtype).view(-1))
        else:
            frozen[torch.unravel_index(self.index, frozen.shape)] = values.to(frozen.dtype)

    def read(self, weight: Tensor) -> Tensor:
        """The weight's entries at the selected places, in the shape of the values."""
        return weight[torch.unravel_index(self.index, weight.shape)]

    def to(self, device: torch.device) -> Selected:
        return Selected(self.view, self.places.to(device), self.index.to(device))

    def with_gradient(self, values: Tensor, frozen: Tensor) -> Tensor:
        """The frozen weight, whose gradient at the selected places goes to the values."""
        return SelectedWeight.apply(values, frozen, self.index)


@dataclass(eq=False)
class Whole:
    """A half-precision tensor that is trained whole through a float32 parameter."""

    suffix = MASTER

    def write(self, values: Tensor, frozen: Tensor) -> None:
        frozen.copy_(values)

    def read(self, weight: Tensor) -> Tensor:
        return weight.clone()

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
    local.view(-1)[index] = values.detach().to_local().to(local.dtype)
