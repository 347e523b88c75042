"""Attach a selection to a model, so that only what it names is trained (Eq. 5-6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewtune.delta import Delta, frozen_buffers, take
from fewtune.errors import TuningError
from fewtune.neurons import Owner, has_running_statistics, nearest, owners
from fewtune.selection import Selection
from fewtune.tuning import layers, stepping
from fewtune.tuning.functions import sharded
from fewtune.tuning.groups import param_groups
from fewtune.tuning.layers import Tuned, write_values
from fewtune.tuning.ops import SelectedPlaces
from fewtune.tuning.slots import MASTER, SELECTED, Selected, Whole
from fewtune.tuning.unmoved import Sample

stepping.follow_optimizers()
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

    def _held(self, suffix: str) -> nn.Parameter:
        owner = self.owners[0]
        held = owner.module._parameters[owner.attribute + suffix]
        assert held is not None
        return held


def attach(
    model: nn.Module, selection: Selection, *, running_statistics: Literal["frozen", "update"] = "frozen"
) -> Tuner:
    """Freezes a model but for what a selection names, which is trained through compact values.

    The model stays the same object, and its layers instances of their classes. Order: create the model, convert
    (SyncBatchNorm), move and cast it, attach, then wrap it (DDP, FSDP2), compile it, make the optimiser. Values are
    written into the weights after every step of a ``torch.optim`` optimiser; after any other change of them call
    `Tuner.sync` (a forward pass that is not compiled does so itself where it can tell that they changed).

    Args:
        model: the model that the selection was made for.
        selection: of `fewtune.select`.
        running_statistics: "frozen": batch normalisation uses the pretrained statistics even in training mode;
            "update": training mode updates them, and the delta carries them.

    Raises:
        TuningError: the model is attached already, or the selection was made for another model.
    """
    if running_statistics not in ("frozen", "update"):
        raise TuningError(f"running_statistics={running_statistics!r}; expected 'frozen' or 'update'")
    _check(model, selection)
    held = owners(model)
    flags = {name: owner[0].module._parameters[owner[0].attribute].requires_grad for name, owner in held.items()}  # type: ignore[union-attr]
    buffers = {name: buffer.detach().clone() for name, buffer in _persistent_buffers(model).items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sample = Sample.of(selection, dict(model.named_parameters()))
    trained = {name: _tune_selected(selection, name, tuple(held[name])) for name in selection.places}
    for name in (*selection.whole, *selection.head):
        trained[name] = _tune_whole(tuple(held[name]))
    if running_statistics == "frozen":
        in_head = {name.rpartition(".")[0] for name in selection.head}
        for name, module in model.named_modules():
            if has_running_statistics(module) and name not in in_head:
                layers.freeze_statistics(module)
    return Tuner(model, selection, trained, flags, buffers, sample)


def _check(model: nn.Module, selection: Selection) -> None:
    if any(isinstance(module, Tuned) for module in model.modules()):
        raise TuningError("a selection is attached to this model already; detach it first")
    if any(sharded(p) for p in model.parameters()):
        raise TuningError("the model's parameters are distributed already; attach first, then shard (fully_shard)")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in selection.anatomy.shapes.items():
        if name not in shapes:
            raise TuningError(
                f"the selection is of another model: this one has no parameter {name!r}{nearest(name, shapes)}"
            )
        if shapes[name] != shape:
            raise TuningError(f"the selection is of another model: {name} has shape {shapes[name]}, expected {shape}")
    for name in selection.places:
        if not dict(model.named_parameters())[name].is_floating_point():
            raise TuningError(f"{name} is not a floating-point weight and cannot be trained")


def _tune_selected(selection: Selection, name: str, held: tuple[Owner, ...]) -> Trained:
    view, places = selection.anatomy.views[name], selection.places[name]
    weight = held[0].module._parameters[held[0].attribute]
    assert weight is not None
    groups = getattr(held[0].module, "groups", 1) if view.kind == "rows" and len(view.shape) > 2 else 1
    taps = view.fan_in // view.shape[1] if view.kind == "rows" and len(view.shape) > 2 else 1
    of = SelectedPlaces.of((places.neurons, places.fan_in), places.flat, groups=groups, taps=taps, device=weight.device)
    index = view.stored_index(places.flat).view(of.slot.shape).to(weight.device)
    slot = Selected(view, of, index)
    before = slot.read(weight.detach())
    dtype = torch.float32 if weight.dtype in HALF else weight.dtype
    values = nn.Parameter(before.to(dtype, copy=True))
    for owner in held:
        layers.tune(owner.module, owner.attribute, slot, values)
    return Trained(held, slot.suffix, before)


def _tune_whole(held: tuple[Owner, ...]) -> Trained:
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


class Tuner:
    """A model with a selection attached; made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        trained: Mapping[str, Trained],
        flags: Mapping[str, bool],
        buffers: Mapping[str, Tensor],
        sample: Sample,
    ) -> None:
        self.model = model
        self.selection = selection
        self._trained = dict(trained)
        self._flags = dict(flags)
        self._buffers = dict(buffers)
        self._sample = sample
        self._attached = True

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return self.selection.trained

    @property
    def backbone_parameters(self) -> int:
        """Number of the model's parameters outside the head."""
        return self.selection.anatomy.backbone_parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name of the model's parameter: compact values, tensors trained whole, head."""
        self._must_be_attached()
        return {name: t.parameter for name, t in self._trained.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what is trained, for an optimiser."""
        return list(self.named_parameters().values())

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Two groups for an optimiser, backbone and head, each with its learning rate where one is given."""
        return param_groups(self.named_parameters(), self.selection.head, lr, head_lr)

    def sync(self) -> None:
        """Writes the values into the weights: after any change of them that was not a step of a torch optimiser."""
        self._must_be_attached()
        for module in self.model.modules():
            write_values(module)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's state without anything of fewtune: loads strictly into the plain model."""
        self._must_be_attached()
        added = {
            f"{prefix}{'.' if prefix else ''}{attribute}{slot.suffix}"
            for prefix, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, Tuned)
            for attribute, slot in module._fewtune.tuned.items()
        }
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in added}

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The same as `plain_state_dict`, since nothing is added that would have to be merged."""
        return self.plain_state_dict()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The compact trained state: what is trained, and the buffers that training changed."""
        values = {name: p.detach().clone() for name, p in self.named_parameters().items()}
        return {"values": values, "buffers": {n: b.clone() for n, b in self._changed_buffers().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            TuningError: the state is of another selection.
        """
        named, buffers = self.named_parameters(), _persistent_buffers(self.model)
        values = state.get("values", {})
        if different := set(named) ^ set(values):
            raise TuningError(f"the state is of another selection: {sorted(different)[0]} is in one of them only")
        for name, parameter in named.items():
            if parameter.shape != values[name].shape:
                raise TuningError(
                    f"the state is of another selection: {name} has {tuple(values[name].shape)} values, "
                    f"expected {tuple(parameter.shape)}"
                )
        for name, parameter in named.items():
            parameter.copy_(values[name])
        for name, before in self._buffers.items():
            buffers[name].copy_(state.get("buffers", {}).get(name, before))
        self.sync()

    def delta(self, metadata: Mapping[str, Any] | None = None) -> Delta:
        """What the task changed, as a file in the making: ``tuner.delta(metadata).save(path)``.

        Raises:
            TuningError: weights that were not selected have moved, so that no delta leads from the backbone to them.
        """
        self._must_be_attached()
        self.sync()
        parameters = {
            name: _whole_tensor(p) for name, p in self.model.named_parameters() if name in self.selection.anatomy.shapes
        }
        if moved := self._sample.first_moved(parameters):
            raise TuningError(
                f"weights of {moved} that were not selected have other numbers than when they were attached. An "
                "average taken as d*e + (1-d)*w does that by rounding; take it by lerp, like torch.lerp and "
                "get_ema_multi_avg_fn. What was trained is whole: keep tuner.state_dict(), load the backbone anew, "
                "attach the selection, and load the state"
            )
        changed = self._changed_buffers()
        return take(
            self.selection,
            parameters,
            {
                name: t.before.reshape(-1) if name in self.selection.places else t.before
                for name, t in self._trained.items()
            },
            buffers=changed,
            buffers_before={name: self._buffers[name] for name in changed},
            frozen={name: b for name, b in frozen_buffers(self.model).items() if name not in changed},
            metadata=dict(metadata or {}),
        )

    @torch.no_grad()
    def detach(self, keep: bool = True) -> None:
        """A plain model again: tuned, or bit for bit as it was before `attach`.

        Classes and ``requires_grad`` are restored, compact parameters are gone.

        Raises:
            TuningError: FSDP has sharded the model, or it lost a module.
        """
        self._must_be_attached()
        if any(sharded(trained.tensor) for trained in self._trained.values()):
            raise TuningError(
                "a model that FSDP has sharded cannot be detached: take tuner.plain_state_dict() or tuner.delta(), "
                "and load it into a plain model"
            )
        named = dict(self.model.named_parameters())
        if lost := self._flags.keys() - named.keys():
            raise TuningError(
                f"the model has no parameter {min(lost)!r} any more, which it had when the selection was attached: "
                "put the module back, or load the model anew"
            )
        self.sync()
        if not keep:
            self._write_before()
        for trained in self._trained.values():
            trained.tensor.grad = None
        for module in self.model.modules():
            layers.restore(module)
        for name, flag in self._flags.items():
            named[name].requires_grad_(flag)
        self._trained, self._buffers, self._sample = {}, {}, Sample({})  # copies of what was there before
        self._attached = False

    def _write_before(self) -> None:
        for trained in self._trained.values():
            tensor, before = trained.tensor.detach(), trained.before.to(trained.tensor.device)
            if trained.suffix == SELECTED:
                module: Any = trained.owners[0].module
                module._fewtune.tuned[trained.owners[0].attribute].write(before, tensor)
            else:
                tensor.copy_(before)
        buffers = _persistent_buffers(self.model)
        for name, before in self._buffers.items():
            buffers[name].copy_(before)

    def _changed_buffers(self) -> dict[str, Tensor]:
        now = _persistent_buffers(self.model)
        return {n: now[n].detach() for n, b in self._buffers.items() if not torch.equal(now[n], b.to(now[n].device))}

    def _must_be_attached(self) -> None:
        if not self._attached:
            raise TuningError("this tuner is detached; attach the selection again")


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _whole_tensor(parameter: Tensor) -> Tensor:
    sharded: Any = parameter
    return sharded.full_tensor() if hasattr(sharded, "full_tensor") else parameter.detach()
