"""A model taken apart: its neurons' weights, the role of every other parameter, its head."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fewtune.errors import FewtuneError, ModelError, SelectionError, nearest
from fewtune.neurons.layers import ASK_MODEL, HeadSpec, described, find_head
from fewtune.neurons.roles import Role
from fewtune.neurons.views import View, sizes
from fewtune.quantised import is_quantised, logical_shape, scheme


class Owner(NamedTuple):
    """A module that holds a parameter, and the attribute that holds it."""

    module_name: str
    module: nn.Module
    attribute: str


@dataclass(frozen=True)
class Anatomy:
    """What `select` needs to know of a model.

    ``views``: every weight that has neurons, head aside, by parameter name. ``roles``: the role of every other
    parameter. ``shapes``: the shape of every parameter. Tied parameters stand once, under their first name.
    """

    views: Mapping[str, View]
    roles: Mapping[str, Role]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def backbone_parameters(self) -> int:
        """Number of parameters outside the head."""
        return sum(prod(shape) for name, shape in self.shapes.items() if self.roles.get(name) is not Role.HEAD)

    @cached_property
    def connections(self) -> int:
        """Number of connections of all neurons."""
        return sum(prod(view.shape) for view in self.views.values())

    @cached_property
    def unknown_share(self) -> float:
        """The part of the backbone's parameters that is of unknown role, and so frozen."""
        unknown = sum(prod(self.shapes[name]) for name in self.named(Role.OTHER))
        return unknown / max(1, self.backbone_parameters)

    def named(self, role: Role) -> tuple[str, ...]:
        """The parameters of one role, in the model's order."""
        return tuple(name for name, r in self.roles.items() if r is role)

    def with_roles(self, overrides: Mapping[str, str | Role] | None) -> Anatomy:
        """Roles set by glob patterns of parameter names; a neuron's weight given a role is no longer selected from.

        Raises:
            SelectionError: a pattern matches nothing, or a role does not exist.
        """
        if not overrides:
            return self
        views, roles = dict(self.views), dict(self.roles)
        for pattern, wanted in overrides.items():
            if wanted not in list(Role):
                raise SelectionError(
                    f"roles: {wanted!r} (for {pattern!r}) is no role; expected one of {', '.join(Role)}"
                )
            matched = fnmatch.filter(self.shapes, pattern)
            if not matched:
                raise SelectionError(f"roles: no parameter matches {pattern!r}{nearest(pattern, self.shapes)}")
            for name in matched:
                views.pop(name, None)
                roles[name] = Role(wanted)
        return replace(self, views=views, roles=roles)

    def to_json(self) -> dict[str, Any]:
        views = {n: [list(v.shape), v.kind, v.groups] for n, v in self.views.items()}
        roles = {n: r.value for n, r in self.roles.items()}
        return {"views": views, "roles": roles, "shapes": {n: list(s) for n, s in self.shapes.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Anatomy:
        """The inverse of `to_json`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the data is of no anatomy.
        """
        shapes = {n: sizes(s) for n, s in data["shapes"].items()}
        views = {n: View.from_json(v) for n, v in data["views"].items()}
        roles = {n: Role(r) for n, r in data["roles"].items()}
        if views.keys() & roles.keys() or views.keys() | roles.keys() != shapes.keys():
            raise ValueError("every parameter must have either neurons or a role")
        if different := [n for n, view in views.items() if view.shape != shapes[n]]:
            raise ValueError(f"{different[0]} has two shapes")
        return cls(views, roles, shapes)


def describe(model: nn.Module, head: HeadSpec = ASK_MODEL, roles: Mapping[str, str | Role] | None = None) -> Anatomy:
    """The anatomy of a model.

    Args:
        model: any module.
        head: name or names of the modules that are trained whole and never selected from; None where there is none;
            left out, it is asked of the model (see `find_head`).
        roles: roles set by hand, by glob patterns of parameter names.

    Raises:
        ModelError: ``head`` names no module; a selection is attached to the model. SelectionError: a pattern of
            ``roles`` matches nothing.
    """
    if any("_fewtune" in vars(module) for module in model.modules()):  # what `fewtune.tuning` leaves on a layer
        raise ModelError("a selection is attached to this model; detach it first (tuner.detach), then score anew")
    head_modules = {id(m) for name in find_head(model, head) for m in model.get_submodule(name).modules()}
    names = {id(p): name for name, p in model.named_parameters()}
    seen: dict[str, View | Role] = {}
    outside_head: set[str] = set()
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            continue  # described through the module that it belongs to
        for holder, attribute, what in described(module):
            name = names[id(holder._parameters[attribute])]
            if id(module) not in head_modules:
                outside_head.add(name)
            # A tied parameter is a neuron's weight if any of its owners uses it so; else its first owner decides.
            if name not in seen or (isinstance(what, View) and not isinstance(seen[name], View)):
                seen[name] = what
    shapes = {name: logical_shape(p) for name, p in model.named_parameters()}
    views = {n: v for n in shapes if isinstance(v := seen.get(n), View) and n in outside_head}
    others = {
        n: Role.HEAD if n in seen and n not in outside_head else seen.get(n, Role.OTHER)
        for n in shapes
        if n not in views
    }
    return Anatomy(views, others, shapes).with_roles(roles)  # type: ignore[arg-type]


def owners(model: nn.Module) -> dict[str, list[Owner]]:
    """Every place that holds a parameter, by the parameter's first name; tied parameters have several."""
    names = {id(p): name for name, p in model.named_parameters()}
    result: dict[str, list[Owner]] = {name: [] for name in names.values()}
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                result[names[id(parameter)]].append(Owner(module_name, module, attribute))
    return result


def require_tunable(tensors: Mapping[str, torch.Tensor], error: type[FewtuneError]) -> None:
    """Raises ``error``, which says what to do, where a weight's numbers are quantised in a way that is not known."""
    for name, tensor in tensors.items():
        if is_quantised(tensor) and scheme(tensor) is None:
            raise error(
                f"{name} is of {_kind(tensor)}: it is quantised in a way that fewtune does not know; quantise it by "
                "torchao's Int8WeightOnlyConfig or bitsandbytes' 4 bits, load the backbone in float32, bfloat16 or "
                f"float16, or leave the weight out when its connections are scored, with roles={{{name!r}: 'other'}}"
            )


def require_float(tensors: Mapping[str, torch.Tensor], error: type[FewtuneError]) -> None:
    """Raises ``error``, which says what to do, where a tensor that is to be trained whole is quantised."""
    for name, tensor in tensors.items():
        if is_quantised(tensor):
            raise error(
                f"{name} is of {scheme(tensor) or _kind(tensor)}, and only float numbers can be trained whole: load "
                "the backbone in float32, or leave it out when the model is quantised, as the head must be"
            )


def _kind(tensor: torch.Tensor) -> str:
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return str(tensor.dtype) if plain or not tensor.is_floating_point() else type(tensor).__name__
