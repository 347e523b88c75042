"""A model with a selection attached: what is trained, its state, the delta, and the way back to a plain model."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.delta import Delta, frozen_buffers, take
from fewtune.errors import TuningError
from fewtune.quantised import Overlaid, dequantised_state
from fewtune.selection import Selection
from fewtune.sharded import is_sharded
from fewtune.tuning import layers
from fewtune.tuning.frozen_sample import Sample
from fewtune.tuning.groups import ParamGroup, param_groups
from fewtune.tuning.layers import Tuned, write_values
from fewtune.tuning.parts import Parts
from fewtune.tuning.stepping import FOLLOWERS
from fewtune.tuning.trained import Trained


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
        parts: Parts,
        overlaid: Overlaid,
    ) -> None:
        self.model = model
        self.selection = selection
        self._trained = dict(trained)
        self._flags = dict(flags)
        self._buffers = dict(buffers)
        self._sample = sample
        self._parts = parts
        self._overlaid = overlaid
        self._steps = 0
        self._attached = True
        FOLLOWERS.add(self)

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

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[ParamGroup]:
        """Two groups for an optimiser, backbone and head, each with its learning rate where one is given."""
        return param_groups(self.named_parameters(), self.selection.head, lr, head_lr)

    def sync(self) -> None:
        """Writes the values into the weights: after any change of them that was not a step of a torch optimiser.

        Raises:
            TuningError: a module of the model was replaced since the selection was attached.
        """
        self._must_be_attached()
        self._parts.check_modules(self.model)
        self._write()

    def _write(self) -> None:
        for module in self.model.modules():
            write_values(module)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's state without anything of fewtune: loads strictly into the plain model.

        Quantised weights are in it as the float numbers that they stand for, the tuned ones among them.

        Raises:
            TuningError: the model's modules or parameters are others than when the selection was attached.
        """
        self._must_be_attached()
        self._parts.check(self.model, self.parameters())
        added = {
            f"{prefix}{'.' if prefix else ''}{attribute}{tensor.suffix}"
            for prefix, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, Tuned)
            for attribute, tensor in module._fewtune.tuned.items()
        }
        return dequantised_state({name: held for name, held in self.model.state_dict().items() if name not in added})

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The same as `plain_state_dict`, since nothing is added that would have to be merged."""
        return self.plain_state_dict()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The compact trained state: what is trained, and the buffers that training changed.

        Where values are in units of their input, the units go with them.
        """
        values = {name: p.detach().clone() for name, p in self.named_parameters().items()}
        scales = {name: units.scale.clone() for name, t in self._trained.items() if (units := t.units) is not None}
        buffers = {name: buffer.clone() for name, buffer in self._changed_buffers().items()}
        return {"values": values, "buffers": buffers, **({"scales": scales} if scales else {})}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            TuningError: the state is of another selection.
        """
        named, buffers = self.named_parameters(), persistent_buffers(self.model)
        values = state.get("values", {})
        if different := set(named) ^ set(values):
            raise TuningError(f"the state is of another selection: {sorted(different)[0]} is in one of them only")
        for name, parameter in named.items():
            if parameter.shape != values[name].shape:
                raise TuningError(
                    f"the state is of another selection: {name} has {tuple(values[name].shape)} values, "
                    f"expected {tuple(parameter.shape)}"
                )
        scales = state.get("scales", {})
        if different := scales.keys() ^ {name for name, t in self._trained.items() if t.units is not None}:
            raise TuningError(
                f"the state is of values in other units: {min(different)} is in units of its input in one of the two "
                "only; attach with column_rms, or without, as the state was made"
            )
        for name, scale in scales.items():
            self._trained[name].rescale(scale)
        for name, parameter in named.items():
            parameter.copy_(values[name])
        for name, before in self._buffers.items():
            buffers[name].copy_(state.get("buffers", {}).get(name, before))
        self.sync()

    def delta(self, metadata: Mapping[str, object] | None = None) -> Delta:
        """What the task changed, as a file in the making: ``tuner.delta(metadata).save(path)``.

        Raises:
            TuningError: weights that were not selected have moved, so that no delta leads from the backbone to them;
                modules were replaced or parameters added; or the model lies on the meta device.
        """
        self._must_be_attached()
        self._parts.check(self.model, self.parameters())
        self.sync()
        held = self._parts.parameters()
        if meta := [name for name, parameter in held.items() if parameter.is_meta]:
            raise TuningError(
                f"{meta[0]} is on the meta device and has no numbers: move the model back, load its state"
            )
        parameters = {name: _whole_tensor(p) for name, p in held.items() if name in self.selection.anatomy.shapes}
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

        Classes and ``requires_grad`` are restored, compact parameters are gone. A quantised weight that was tuned
        stays an overlay (`fewtune.quantised.Overlay`) where the values are kept.

        Raises:
            TuningError: FSDP has sharded the model, or it lost a module.
        """
        self._must_be_attached()
        if any(is_sharded(trained.tensor) for trained in self._trained.values()):
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
        self._write()
        if not keep:
            self._write_before()
        for trained in self._trained.values():
            trained.tensor.grad = None
        for module in self.model.modules():
            layers.restore(module)
        for name, flag in self._flags.items():
            named[name].requires_grad_(flag)
        self._overlaid.take_out(but=self.selection.places if keep else ())
        # copies of what was there before
        self._trained, self._buffers, self._sample, self._overlaid = {}, {}, Sample({}), Overlaid({})
        self._attached = False

    def _write_before(self) -> None:
        for trained in self._trained.values():
            trained.put_back()
        buffers = persistent_buffers(self.model)
        for name, before in self._buffers.items():
            buffers[name].copy_(before)

    def _changed_buffers(self) -> dict[str, Tensor]:
        now = persistent_buffers(self.model)
        return {n: now[n].detach() for n, b in self._buffers.items() if not torch.equal(now[n], b.to(now[n].device))}

    def after_step(self, stepped: Set[int]) -> None:
        """Looks for replaced modules after an optimiser's first step, its second, fourth, eighth and so on.

        Raises:
            TuningError: a module of the model was replaced since the selection was attached.
        """
        if self._attached and any(id(trained.parameter) in stepped for trained in self._trained.values()):
            self._steps += 1
            if self._steps & (self._steps - 1) == 0:
                self._parts.check_modules(self.model)

    def _must_be_attached(self) -> None:
        if not self._attached:
            raise TuningError("this tuner is detached; attach the selection again")


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _whole_tensor(parameter: Tensor) -> Tensor:
    sharded: Any = parameter
    return sharded.full_tensor() if hasattr(sharded, "full_tensor") else parameter.detach()
