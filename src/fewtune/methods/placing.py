"""Putting a module behind, or before, a module of a model without replacing it.

The new module becomes a child of the one that it serves, so that `train()`, `to()`, `state_dict()`, copies and DDP see
it, and a hook that is a plain function calls it, so that a copied model calls its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewtune.errors import TuningError
from fewtune.neurons import Anatomy
from fewtune.selection import Selection


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


class Method:
    """A method that puts modules of its own into a frozen model; its settings are its fields (a frozen dataclass)."""

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

    def settings(self) -> dict[str, Any]:
        """The fields, able to go into JSON."""
        return asdict(self)  # type: ignore[call-overload]

    def arrays(self) -> dict[str, Tensor]:
        """Settings that are tensors."""
        return {}


def place(
    owner: nn.Module, name: str, attribute: str, module: nn.Module, hook: Callable[..., Any], *, like: nn.Module
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
