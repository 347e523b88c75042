"""The tuner of every method that puts modules of its own into a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.delta.checks import inventory
from fewtune.errors import ModelError, TuningError
from fewtune.methods.placing import Method
from fewtune.methods.taskfile import MethodFile, known_by
from fewtune.models.backbone import seeded
from fewtune.neurons import Role, describe
from fewtune.tuning import attach
from fewtune.tuning.groups import param_groups


class Inserted:
    """A frozen model with a method's modules in it, whose head is trained whole.

    It answers what the trainer asks of `fewtune.Tuner`. Freezing, the head and whatever the method trains of the model
    itself are that tuner's (`base`). Modules stay the model's children, so that `eval()`, `to()`, DDP and copies see
    them; the model's own parameters stay where and what they were (PEFT moves those that it wraps).
    """

    def __init__(self, model: nn.Module, head: tuple[str, ...], method: Method, *, seed: int = 0) -> None:
        """Put the method into the model.

        Args:
            model: plain, on its device.
            head: names of the modules that are trained whole.
            method: with its settings.
            seed: of the new modules' numbers; the caller's random state is not touched.

        Raises:
            ModelError: the method does not know the model's architecture, or `head` names no module.
        """
        if not head:
            raise ModelError(f"{method.name} needs to know the head that is trained with it, and the model has none")
        self.model, self.head, self.method = model, head, method
        self.anatomy = describe(model, head)
        self.fingerprint = known_by(inventory(model).tensors, self.anatomy, model)
        names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        own = set(model.state_dict())
        self.base = attach(model, method.base(self.anatomy))
        parameters = list(model.parameters())
        trained = [parameter.requires_grad for parameter in parameters]
        with seeded(seed):
            self.added = method.insert(model, self.anatomy)
        for parameter, flag in zip(parameters, trained, strict=True):
            parameter.requires_grad_(flag)  # PEFT freezes all but its own
        for parameter in self.added.parameters().values():
            parameter.requires_grad_(True)
        state = model.state_dict(keep_vars=True)
        self._plain = {
            new: new if new in own else names[id(t)] for new, t in state.items() if new in own or id(t) in names
        }

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def backbone_parameters(self) -> int:
        """Number of the plain model's parameters outside the head."""
        return self.anatomy.backbone_parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the method's modules, what it trains of the model itself, the head."""
        return self.added.parameters() | self.base.named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what is trained, for an optimiser."""
        return list(self.named_parameters().values())

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Two groups for an optimiser, backbone and head, each with its learning rate where one is given."""
        return param_groups(self.named_parameters(), self.anatomy.named(Role.HEAD), lr, head_lr)

    def sync(self) -> None:
        """After a change of values by hand: writes those that stand for some of a weight into it."""
        self.base.sync()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The compact trained state."""
        added = {name: parameter.detach().clone() for name, parameter in self.added.parameters().items()}
        return {**self.base.state_dict(), "added": added}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            TuningError: the state is of another method, of other settings, or of another model.
        """
        own, saved = self.added.parameters(), state.get("added", {})
        if different := own.keys() ^ saved.keys():
            raise TuningError(f"the state is of another method or model: {min(different)} is in one of them only")
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise TuningError(
                    f"the state is of other settings: {name} is {list(saved[name].shape)} in it, "
                    f"expected {list(parameter.shape)}"
                )
        self.base.load_state_dict({key: value for key, value in state.items() if key != "added"})
        for name, parameter in own.items():
            parameter.copy_(saved[name])

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's own tensors under their original names, without the method's modules."""
        self.sync()
        state = self.model.state_dict()
        return {plain: state[name] for name, plain in self._plain.items()}

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The state of a plain model that gives the same outputs; its library loads it strictly.

        Raises:
            TuningError: the method's modules cannot be worked into the weights.
        """
        plain = self.plain_state_dict()
        folded = self.method.fold(self.model, self.anatomy, plain)
        if folded is None:
            raise TuningError(
                f"{self.method.name} adds modules to the model that its weights cannot take up, so there is no plain "
                "checkpoint of it; lora, ssf and spt-lora have one, and so have gps, bias, linear and full"
            )
        return plain | folded

    def delta(self, metadata: Mapping[str, Any] | None = None) -> MethodFile:
        """The task as a file in the making: ``tuner.delta(metadata).save(path)``."""
        self.sync()
        state = self.state_dict()
        return MethodFile.of(self.method, self.head, self.anatomy, state, self.fingerprint, metadata or {})
