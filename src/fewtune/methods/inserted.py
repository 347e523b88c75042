"""Methods that put modules of their own into a frozen model: how a module is put there, and the tuner of the whole.

A new module becomes a child of the one that it serves, so that `train()`, `to()`, `state_dict()`, copies and DDP see
it, and a hook that is a plain function calls it, so that a copied model calls its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewtune.delta.checks import inventory
from fewtune.errors import ModelError, SelectionError, TuningError
from fewtune.files import Json
from fewtune.methods.base import Insertion, Method, Prepared, Run, S, State
from fewtune.methods.file import MethodFile, known_by
from fewtune.models.backbone import seeded
from fewtune.neurons import Anatomy, Role, describe, excluded
from fewtune.selection import Selection
from fewtune.tuning import attach
from fewtune.tuning.groups import ParamGroup, param_groups


@dataclass(frozen=True)
class Added:
    """What a method put into a model: modules by their qualified names, all of whose parameters are trained."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Qualified name -> parameter."""
        return {
            f"{name}.{inner}": parameter
            for name, module in self.modules.items()
            for inner, parameter in module.named_parameters()
        }


class Modules(Insertion):
    """Modules that a method puts into a frozen model; its settings are its fields (a frozen dataclass)."""

    name: ClassVar[str]

    def base(self, anatomy: Anatomy) -> Selection:
        """What of the model itself is trained: the head, unless a method says more."""
        return Selection(anatomy, {}, {})

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """Put the modules in and say which they are; their random numbers are torch's."""
        raise NotImplementedError

    def fold(self, model: nn.Module, anatomy: Anatomy, plain: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The plain tensors that change where the modules are worked into them; None: the method cannot be merged."""
        return None

    def settings(self) -> Json:
        """The fields, able to go into JSON; without `exclude` where it is empty, as in files of fewtune 0.1.0."""
        settings: Json = asdict(self)  # type: ignore[call-overload]
        if not settings.get("exclude", True):
            del settings["exclude"]
        return settings

    def arrays(self) -> dict[str, Tensor]:
        """Settings that are tensors."""
        return {}

    def attach(self, model: nn.Module, head: tuple[str, ...], *, seed: int = 0) -> Inserted:
        """Put the modules into a plain model and give its tuner."""
        return Inserted(model, head, self, seed=seed)


def inserting(
    name: str,
    settings: type[S],
    make: Callable[[S], Modules],
    read: Callable[..., Modules],
    *,
    starts_plain: bool = True,
) -> Method:
    """The method that puts in what `make` gives for its settings; `read` makes it from the settings of a task file."""

    def attached(run: Run, prepared: Prepared | None) -> Inserted:
        return make(run.settings(settings)).attach(run.model, run.head, seed=run.seed)

    return Method(name, attached, settings, read=lambda saved, arrays: read(**saved), starts_plain=starts_plain)


def where_allowed(anatomy: Anatomy, exclude: tuple[str, ...], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of layers by name those that `exclude` leaves to a method.

    Raises:
        SelectionError: a pattern matches no module, or no layer is left.
    """
    left_out = excluded(anatomy, exclude)
    allowed = {name: module for name, module in modules.items() if f"{name}.weight" not in left_out}
    if not allowed:
        raise SelectionError("exclude leaves no layer that the method could serve; exclude fewer modules")
    return allowed


def place(
    owner: nn.Module,
    name: str,
    attribute: str,
    module: nn.Module,
    hook: Callable[..., Tensor | tuple[Tensor, ...]],
    *,
    like: nn.Module,
) -> dict[str, nn.Module]:
    """Make `module` a child of `owner` (called `name`), on the device and in the dtype of `like`'s first parameter, and
    call `hook(owner, inputs, output)` after each forward pass of `owner`; {qualified name: module}.

    A half-precision model gets float32 modules: what is trained needs the bits. Run it under autocast.

    Raises:
        TuningError: there is such a module already.
    """
    adopt(owner, name, attribute, module, like)
    owner.register_forward_hook(hook)
    return {f"{name}.{attribute}" if name else attribute: module}


def adopt(owner: nn.Module, name: str, attribute: str, module: nn.Module, like: nn.Module) -> None:
    """The part of `place` without the hook."""
    if hasattr(owner, attribute):
        raise TuningError(f"{name or 'the model'} has a module {attribute} already: load the model anew")
    parameter = next(like.parameters())
    dtype = parameter.dtype if parameter.dtype not in (torch.float16, torch.bfloat16) else torch.float32
    owner.add_module(attribute, module.to(parameter.device, dtype))


class Inserted:
    """The tuner of a frozen model with a method's modules in it, whose head is trained whole.

    Freezing, the head and whatever the method trains of the model itself are `fewtune.Tuner`'s (`base`). Modules stay
    the model's children, so that `eval()`, `to()`, DDP and copies see them; the model's own parameters stay where and
    what they were (PEFT moves those that it wraps).
    """

    def __init__(self, model: nn.Module, head: tuple[str, ...], method: Modules, *, seed: int = 0) -> None:
        """Put the modules into the model.

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
        plain = set(model.state_dict())
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
            new: new if new in plain else names[id(t)] for new, t in state.items() if new in plain or id(t) in names
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

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[ParamGroup]:
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
    def load_state_dict(self, state: State) -> None:
        """Restores what `state_dict` gave.

        Raises:
            TuningError: the state is of another method, of other settings, or of another model.
        """
        present, saved = self.added.parameters(), state.get("added", {})
        if different := present.keys() ^ saved.keys():
            raise TuningError(f"the state is of another method or model: {min(different)} is in one of them only")
        for name, parameter in present.items():
            if parameter.shape != saved[name].shape:
                raise TuningError(
                    f"the state is of other settings: {name} is {list(saved[name].shape)} in it, "
                    f"expected {list(parameter.shape)}"
                )
        self.base.load_state_dict({key: value for key, value in state.items() if key != "added"})
        for name, parameter in present.items():
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

    def delta(self, metadata: Mapping[str, object] | None = None) -> MethodFile:
        """The task as a file in the making: ``tuner.delta(metadata).save(path)``."""
        self.sync()
        state = self.state_dict()
        return MethodFile.of(self.method, self.head, self.anatomy, state, self.fingerprint, metadata or {})
