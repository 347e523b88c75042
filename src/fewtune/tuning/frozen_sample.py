"""A sample of the frozen weights: a delta is refused where something moved them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewtune.delta.entries import read
from fewtune.selection import Selection

SAMPLE = 512
"""Entries of a tensor that are looked at."""


@dataclass(frozen=True)
class Sample:
    """Some entries of every tensor that a selection does not train: flat positions and numbers by parameter name."""

    entries: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, selection: Selection, parameters: Mapping[str, Tensor]) -> Sample:
        """Of a model's parameters as they are now."""
        entries = {}
        for name in selection.anatomy.shapes.keys() - {*selection.whole, *selection.head}:
            tensor = parameters[name]
            at = torch.arange(0, tensor.numel(), tensor.numel() // SAMPLE | 1)
            if name in selection.places:
                at = at[~torch.isin(at, selection.anatomy.views[name].stored_index(selection.places[name].flat))]
            entries[name] = at, read(tensor, at)
        return cls(entries)

    def first_moved(self, parameters: Mapping[str, Tensor]) -> str | None:
        """The first of the parameters, by name, that has other numbers than it had; None where none has."""
        for name, (at, before) in sorted(self.entries.items()):
            now = read(parameters[name], at)
            if not torch.equal(now, before.to(now.device, now.dtype)):
                return name
        return None
