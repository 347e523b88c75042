"""A stored weight seen as a matrix [neurons, fan_in]."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from torch import Tensor

Kind = Literal["rows", "columns", "transposed", "experts", "experts transposed"]


LEAST: dict[Kind, int] = {"rows": 1, "columns": 2, "transposed": 2, "experts": 3, "experts transposed": 3}
"""The fewest dimensions of a weight of each kind."""
LARGEST = 2**48
"""Largest number in a file that is taken for a size."""


def sizes(data: Any) -> tuple[int, ...]:
    """A list of JSON as sizes; JSON's true and 1.0 are none.

    Raises:
        ValueError: it is no list of whole numbers from 0 on, or the numbers are absurd.
    """
    if not isinstance(data, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in data):
        raise ValueError(f"expected a list of sizes, got {data!r}")
    return tuple(data)


@dataclass(frozen=True)
class View:
    """How a stored weight is seen as [neurons, fan_in].

    * ``rows``: dimension 0 holds the neurons. Linear [out, in]; convolutions [out, in / groups, *kernel], so that
      fan_in = in / groups * prod(kernel); the packed projection of attention [3 * dim, dim].
    * ``columns``: dimension 1 holds the neurons, as in transformers' ``Conv1D`` [in, out].
    * ``transposed``: transposed convolutions [in, out / groups, *kernel]; with one group the same as ``columns``.
    * ``experts``, ``experts transposed``: a stack of matrices [experts, out, in] or [experts, in, out]; every expert
      has neurons of its own.

    ``groups``: of a convolution. Files of fewtune before 0.1 say 1 of every ``rows``, whose matrix does not need it.
    """

    shape: tuple[int, ...]
    kind: Kind = "rows"
    groups: int = 1

    @classmethod
    def from_json(cls, data: Any) -> View:
        """Of [shape, kind, groups].

        Raises:
            TypeError, ValueError: there is no such view.
        """
        shape, kind, (groups,) = sizes(data[0]), data[1], sizes(data[2:])
        if kind not in get_args(Kind) or len(shape) < LEAST[kind] or not groups:
            raise ValueError(f"no view of a weight is {data}")
        if kind.startswith("experts") and (len(shape) > 3 or groups != 1):
            raise ValueError(f"no stack of matrices is {data}")
        if kind == "transposed" and shape[0] % groups:
            raise ValueError(f"{shape[0]} inputs do not make {groups} groups")
        return cls(shape, kind, groups)

    @property
    def neurons(self) -> int:
        match self.kind:
            case "rows":
                return self.shape[0]
            case "columns":
                return self.shape[1]
            case "transposed":
                return self.shape[1] * self.groups
            case "experts":
                return self.shape[0] * self.shape[1]
            case "experts transposed":
                return self.shape[0] * self.shape[2]

    @property
    def fan_in(self) -> int:
        return prod(self.shape) // self.neurons if self.neurons else 0

    @property
    def sets(self) -> int:
        """How many equal sets the neurons are, one after the other, each with inputs of its own."""
        if self.kind.startswith("experts"):
            return self.shape[0]
        return self.groups if self.neurons % self.groups == 0 else 1

    @property
    def layout(self) -> tuple[Any, ...]:
        """All that the matrix depends on: equal for a view of today and the same one of an old file."""
        return self.shape, self.kind, self.groups if self.kind == "transposed" else 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight, or anything of its shape, as [neurons, fan_in]; a view of it where strides allow."""
        if self.kind in ("rows", "experts"):
            return weight.reshape(self.neurons, self.fan_in)
        groups, inputs, outputs, kernel = self._grouped
        return weight.reshape(groups, inputs, outputs, *kernel).transpose(1, 2).reshape(self.neurons, self.fan_in)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: [neurons, fan_in] in the stored shape."""
        if self.kind in ("rows", "experts"):
            return matrix.reshape(self.shape)
        groups, inputs, outputs, kernel = self._grouped
        return matrix.reshape(groups, outputs, inputs, *kernel).transpose(1, 2).reshape(self.shape)

    def stored_index(self, flat: Tensor) -> Tensor:
        """Indices into the flattened matrix [neurons, fan_in] as indices into the flattened stored weight."""
        if self.kind in ("rows", "experts"):
            return flat
        neuron, connection = flat // self.fan_in, flat % self.fan_in
        _, inputs, outputs, kernel = self._grouped
        taps = prod(kernel)
        group, output = neuron // outputs, neuron % outputs
        source = group * inputs + connection // taps
        return (source * outputs + output) * taps + connection % taps

    @property
    def _grouped(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Of a weight in which neurons do not come first: groups, inputs and outputs of a group, the kernel."""
        if self.kind == "experts transposed":
            return self.shape[0], self.shape[1], self.shape[2], self.shape[3:]
        groups = self.groups if self.kind == "transposed" else 1
        return groups, self.shape[0] // groups, self.shape[1], self.shape[2:]
