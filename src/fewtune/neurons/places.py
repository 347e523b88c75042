"""The places of some connections in a matrix [neurons, fan_in]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Some connections of a [neurons, fan_in] matrix.

    ``flat`` holds row * fan_in + column, int64, strictly increasing, of shape [connections].
    """

    neurons: int
    fan_in: int
    flat: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> Places:
        """The true places of a boolean [neurons, fan_in]."""
        neurons, fan_in = mask.shape
        return cls(neurons, fan_in, mask.reshape(-1).nonzero().squeeze(1).cpu())

    @property
    def rows(self) -> Tensor:
        """The neuron of every connection, [connections]."""
        return self.flat // self.fan_in

    @property
    def columns(self) -> Tensor:
        """The input of every connection, [connections]."""
        return self.flat % self.fan_in

    @cached_property
    def k(self) -> int | None:
        """Connections of each neuron where all neurons have the same number, else None."""
        if not self.neurons or len(self) % self.neurons:
            return None
        counts = torch.bincount(self.rows, minlength=self.neurons)
        return int(counts[0]) if bool((counts == counts[0]).all()) else None

    def mask(self) -> Tensor:
        """Boolean [neurons, fan_in], true where a connection is selected (Eq. 5)."""
        mask = torch.zeros(self.neurons * self.fan_in, dtype=torch.bool)
        mask[self.flat] = True
        return mask.view(self.neurons, self.fan_in)

    def __len__(self) -> int:
        return self.flat.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Places):
            return NotImplemented
        same_matrix = (self.neurons, self.fan_in) == (other.neurons, other.fan_in)
        return same_matrix and torch.equal(self.flat, other.flat)

    def __hash__(self) -> int:
        return hash((self.neurons, self.fan_in, len(self)))
