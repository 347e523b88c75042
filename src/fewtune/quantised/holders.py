"""Overlays in the place of a model's quantised weights, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from fewtune.quantised.overlay import Overlay, scheme

F = TypeVar("F", bound=Callable[..., Any])


class Holder(NamedTuple):
    """A module that holds a quantised weight, and the attribute that holds it."""

    module: nn.Module
    attribute: str
    kind: type[nn.Module]
    """The module's own class."""


@dataclass(frozen=True, eq=False)
class Overlaid:
    """Overlays for the quantised weights of a model, by name: (who holds it, the weight, its overlay).

    A layer of bitsandbytes, whose forward asks more of its weight than its numbers, is a plain linear layer meanwhile.
    """

    weights: Mapping[str, tuple[tuple[Holder, ...], nn.Parameter, nn.Parameter]]

    @classmethod
    def of(cls, model: nn.Module, places: Mapping[str, Tensor | None] | None = None) -> Overlaid:
        """For all weights of known schemes. ``places``: flat positions that can be written, by parameter name."""
        held: dict[int, list[Holder]] = {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    held.setdefault(id(parameter), []).append(Holder(module, attribute, type(module)))
        made = {}
        for name, weight in model.named_parameters():
            index = (places or {}).get(name)
            if scheme(weight) is not None and (index is not None or not isinstance(weight, Overlay)):
                overlay = nn.Parameter(Overlay.of(weight, index), weight.requires_grad)
                made[name] = tuple(held[id(weight)]), weight, overlay
        return cls(made)

    @property
    def new(self) -> dict[str, nn.Parameter]:
        """The overlays by name."""
        return {name: overlay for name, (_, _, overlay) in self.weights.items()}

    def put_in(self) -> None:
        for holders, _, overlay in self.weights.values():
            for module, attribute, kind in holders:
                module._parameters[attribute] = overlay
                if _of_bitsandbytes(kind):
                    module.__class__ = nn.Linear

    def take_out(self, but: Collection[str] = ()) -> None:
        """The weights that were there before, but for some names, on the device that the model is on by now."""
        for name, (holders, weight, _) in self.weights.items():
            if name in but:
                continue
            present = holders[0].module._parameters[holders[0].attribute]
            if isinstance(present, Overlay) and present.device != weight.device:
                weight = nn.Parameter(present.base, weight.requires_grad)
            for module, attribute, kind in holders:
                module._parameters[attribute] = weight
                if _of_bitsandbytes(kind):
                    module.__class__ = kind


@contextmanager
def overlaid(model: nn.Module) -> Iterator[None]:
    """Within, overlays stand in the place of the model's quantised weights."""
    overlays = Overlaid.of(model)
    overlays.put_in()
    try:
        yield
    finally:
        overlays.take_out()


def seen_dequantised(function: F) -> F:
    """A function of a model that sees its quantised weights as the float numbers that they stand for."""

    @wraps(function)
    def seeing(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with overlaid(model):
            return function(model, *args, **kwargs)

    return cast("F", seeing)


def _of_bitsandbytes(kind: type[nn.Module]) -> bool:
    return issubclass(kind, nn.Linear) and kind.__module__.partition(".")[0] == "bitsandbytes"
