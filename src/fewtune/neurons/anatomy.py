"""A model taken apart: its neurons' weights, the role of every other parameter, its head."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from fewtune.errors import FewtuneError, ModelError, SelectionError
from fewtune.neurons.roles import EXPERT_WEIGHTS, Role, behaves_like_norm, is_experts, listed_role, qualified
from fewtune.neurons.views import View, sizes


class AskModel:
    """The default of ``head``: the model is asked which module is its head."""

    def __repr__(self) -> str:
        return "<asked of the model>"


ASK_MODEL: Final = AskModel()

HeadSpec = str | Iterable[str] | None | AskModel


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


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else ""


def _weight_views(module: nn.Module) -> Iterator[tuple[str, View]]:
    """The attributes of a module that are weights of neurons, told by its class. (The table of layer kinds.)"""

    def view(attribute: str, kind: Any = "rows", groups: int = 1) -> Iterator[tuple[str, View]]:
        shape = _shape(module, attribute)
        if shape is not None:
            yield attribute, View(shape, kind, groups)

    match module:
        case nn.modules.lazy.LazyModuleMixin() if module.has_uninitialized_params():
            raise ModelError(f"{qualified(type(module))} has no shape yet; run one batch through the model first")
        case nn.modules.conv._ConvTransposeNd():
            yield from view("weight", "transposed", module.groups)
        case nn.Linear() | nn.Bilinear() | nn.modules.conv._ConvNd():
            yield from view("weight")
        case nn.MultiheadAttention():
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                yield from view(attribute)
        case nn.RNNBase():  # the gates' neurons, one below the other: weight_ih_l0, weight_hh_l0, …
            for attribute in module._flat_weights_names:
                if getattr(module, attribute).ndim == 2:
                    yield from view(attribute)
        case nn.RNNCellBase():
            for attribute in ("weight_ih", "weight_hh"):
                yield from view(attribute)
        case _ if any(qualified(c) == "transformers.pytorch_utils.Conv1D" for c in type(module).__mro__):
            yield from view("weight", "columns")
        case _ if is_experts(module):
            for attribute in EXPERT_WEIGHTS:
                if attribute in module._parameters:
                    yield from view(attribute, "experts transposed" if module.is_transposed else "experts")


def _shape(module: nn.Module, attribute: str) -> tuple[int, ...] | None:
    """Shape of an attribute; a parametrised one is computed once, in evaluation mode, which changes no state."""
    if not is_parametrized(module, attribute):
        weight = getattr(module, attribute, None)
        return None if weight is None else tuple(weight.shape)
    steps: Any = module.parametrizations
    modes = [(step, step.training) for step in steps[attribute].modules()]
    try:
        steps[attribute].eval()
        with torch.no_grad():
            return tuple(getattr(module, attribute).shape)
    finally:
        for step, training in modes:
            step.training = training


def _described(module: nn.Module) -> Iterator[tuple[nn.Module, str, View | Role]]:
    """Every parameter that a module holds, itself or through its parametrisations: (holder, attribute, what it is)."""
    views = dict(_weight_views(module))
    legacy = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    unlisted: list[str] = []
    for attribute, parameter in module._parameters.items():
        if parameter is None:
            continue
        plain, _, part = attribute.rpartition("_")
        if plain in legacy and part in "gv":  # torch.nn.utils.weight_norm: weight_g and weight_v
            yield module, attribute, views[plain] if part == "v" and plain in views else Role.SCALE
        elif attribute in views:
            yield module, attribute, views[attribute]
        elif (role := listed_role(module, attribute)) is not None:
            yield module, attribute, role
        else:
            unlisted.append(attribute)
    if unlisted:
        role = Role.NORM if behaves_like_norm(module) else Role.OTHER
        yield from ((module, attribute, role) for attribute in unlisted)
    if is_parametrized(module):
        parametrized: Any = module.parametrizations
        for attribute, holder in parametrized.items():
            yield from _parametrized(module, attribute, holder, views.get(attribute))


def _parametrized(
    module: nn.Module, attribute: str, holder: nn.Module, view: View | None
) -> Iterator[tuple[nn.Module, str, View | Role]]:
    """The stored tensors of a parametrised attribute: selection happens on the tensor that has the weight's shape."""
    norm = any(isinstance(step, _WeightNorm) for step in holder.children())
    for original, parameter in holder._parameters.items():
        if parameter is None:
            continue
        if view is not None and tuple(parameter.shape) == view.shape and original in ("original", "original1"):
            yield holder, original, view
        elif norm and original == "original0":
            yield holder, original, Role.SCALE
        else:
            yield holder, original, listed_role(module, attribute) or Role.OTHER


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
    found: dict[str, View | Role] = {}
    outside_head: set[str] = set()
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            continue  # described through the module that it belongs to
        for holder, attribute, what in _described(module):
            name = names[id(holder._parameters[attribute])]
            if id(module) not in head_modules:
                outside_head.add(name)
            # A tied parameter is a neuron's weight if any of its owners uses it so; else its first owner decides.
            if name not in found or (isinstance(what, View) and not isinstance(found[name], View)):
                found[name] = what
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    views = {n: v for n in shapes if isinstance(v := found.get(n), View) and n in outside_head}
    others = {
        n: Role.HEAD if n in found and n not in outside_head else found.get(n, Role.OTHER)
        for n in shapes
        if n not in views
    }
    return Anatomy(views, others, shapes).with_roles(roles)  # type: ignore[arg-type]


def find_head(model: nn.Module, head: HeadSpec = ASK_MODEL) -> tuple[str, ...]:
    """Names of the head's modules.

    Asked of the model: timm's ``get_classifier()``; for transformers, the children outside ``base_model``. A model
    that has neither is taken to have no head, with a warning.

    Raises:
        ModelError: a name that is no module of the model.
    """
    modules = dict(model.named_modules())
    if head is None:
        return ()
    if not isinstance(head, AskModel):
        wanted = (head,) if isinstance(head, str) else tuple(head)
        for name in wanted:
            if name not in modules or not name:
                raise ModelError(f"head: the model has no module {name!r}{nearest(name, modules)}")
        return wanted
    if callable(ask := getattr(model, "get_classifier", None)):
        answer = ask()
        heads = list(answer) if isinstance(answer, (tuple, list)) else [answer]
    elif isinstance(base := getattr(model, "base_model", None), nn.Module):
        heads = [] if base is model else [m for m in model.children() if base not in m.modules()]
    else:
        warnings.warn(
            f"{type(model).__name__} does not say which module is its head: all of it is taken as backbone. "
            "Pass head='name' (trained whole, never selected from) or head=None to say that there is none.",
            stacklevel=3,
        )
        heads = []
    by_identity = {id(m): name for name, m in modules.items()}
    with_parameters = [m for m in heads if isinstance(m, nn.Module) and any(True for _ in m.parameters())]
    return tuple(by_identity[id(m)] for m in with_parameters if id(m) in by_identity)


def owners(model: nn.Module) -> dict[str, list[Owner]]:
    """Every place that holds a parameter, by the parameter's first name; tied parameters have several."""
    names = {id(p): name for name, p in model.named_parameters()}
    result: dict[str, list[Owner]] = {name: [] for name in names.values()}
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                result[names[id(parameter)]].append(Owner(module_name, module, attribute))
    return result


def require_floating(tensors: Mapping[str, torch.Tensor], error: type[FewtuneError]) -> None:
    """Raises ``error``, which says what to do, where a weight that is to be tuned is not floating-point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise error(
                f"{name} is of {tensor.dtype}: quantised weights have no gradient and cannot be tuned; load the "
                "backbone in float32, bfloat16 or float16, or leave the weight out when its connections are scored, "
                f"with roles={{{name!r}: 'other'}}"
            )


_UPDATED_IN_TRAINING = {f"timm.layers.evo_norm.EvoNorm2d{kind}" for kind in ("B0", "B1", "B2")}


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module updates state in training mode: batch and instance normalisation, EvoNorm-B, spectral norm."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return bool(module.track_running_stats)
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return isinstance(module, _SpectralNorm) or not _UPDATED_IN_TRAINING.isdisjoint(classes)
