"""The tensors that a tuner trains: where the model holds each, and its numbers before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.neurons import Owner
from fewtune.selection import Selection
from fewtune.tuning import layers
from fewtune.tuning.ops import SelectedPlaces
from fewtune.tuning.tensors import MASTER, SELECTED, Selected, Whole
from fewtune.tuning.units import Units

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Trained:
    """One trained tensor: where the model holds it, and what it was before.

    ``suffix``: of the parameter registered beside it; empty where the parameter itself is trained.
    ``before``: the whole tensor, or its selected entries in the order of the selection's places.
    """

    owners: tuple[Owner, ...]
    suffix: str
    before: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        """What an optimiser steps; looked up anew, since wrappers such as FSDP replace it."""
        return self._held(self.suffix)

    @property
    def tensor(self) -> nn.Parameter:
        """The model's own tensor."""
        return self._held("")

    @property
    def units(self) -> Units | None:
        """Of the values of selected connections; None where they are the weights themselves."""
        return self._tuned(self.owners[0]).units if self.suffix == SELECTED else None

    def rescale(self, scale: Tensor) -> None:
        """From now on the values are in these units."""
        for owner in self.owners:
            tensor = self._tuned(owner)
            assert tensor.units is not None
            tensor.units = Units(tensor.units.start, scale.to(tensor.units.start))

    def put_back(self) -> None:
        """Writes what there was before into the model's tensor."""
        before = self.before.to(self.tensor.device)
        if self.suffix == SELECTED:
            self._tuned(self.owners[0]).put(before, self.tensor.detach())
        else:
            self.tensor.detach().copy_(before)

    def _tuned(self, owner: Owner) -> Selected:
        module: Any = owner.module
        tensor: Selected = module._fewtune.tuned[owner.attribute]
        return tensor

    def _held(self, suffix: str) -> nn.Parameter:
        owner = self.owners[0]
        held = owner.module._parameters[owner.attribute + suffix]
        assert held is not None
        return held


def tune_selected(
    selection: Selection, name: str, held: tuple[Owner, ...], column_rms: Tensor | None = None
) -> Trained:
    """Trains the selected connections of a weight through compact values; all its owners share them.

    The values are in units of the input, and begin at zero, where the rms of its columns is given.
    """
    view, places = selection.anatomy.views[name], selection.places[name]
    weight = held[0].module._parameters[held[0].attribute]
    assert weight is not None
    groups = getattr(held[0].module, "groups", 1) if view.kind == "rows" and len(view.shape) > 2 else 1
    taps = view.fan_in // view.shape[1] if view.kind == "rows" and len(view.shape) > 2 else 1
    of = SelectedPlaces.of((places.neurons, places.fan_in), places.flat, groups=groups, taps=taps, device=weight.device)
    index = view.stored_index(places.flat).view(of.hot_index.shape).to(weight.device)
    tensor = Selected(view, of, index)
    before = tensor.read(weight.detach())
    dtype = torch.float32 if weight.dtype in HALF else weight.dtype
    start = before.to(dtype, copy=True)
    if column_rms is not None:
        tensor.units = Units.of(start, column_rms, of)
    values = nn.Parameter(start if column_rms is None else torch.zeros_like(start))
    for owner in held:
        layers.tune(owner.module, owner.attribute, tensor, values)
    return Trained(held, tensor.suffix, before)


def tune_whole(held: tuple[Owner, ...]) -> Trained:
    """Trains all of a tensor: itself, or a float32 master beside it where it is of half precision."""
    parameter = held[0].module._parameters[held[0].attribute]
    assert parameter is not None
    before = parameter.detach().clone()
    if parameter.dtype not in HALF:
        parameter.requires_grad_(True)
        return Trained(held, "", before)
    master = nn.Parameter(before.to(torch.float32))
    for owner in held:
        layers.tune(owner.module, owner.attribute, Whole(), master)
    return Trained(held, MASTER, before)
