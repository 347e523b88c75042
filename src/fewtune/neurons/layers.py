"""The table of layer kinds: which attributes of a module are weights of neurons; and which module is the head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from fewtune.errors import ModelError, nearest
from fewtune.neurons.roles import EXPERT_WEIGHTS, Role, behaves_like_norm, is_experts, listed_role, qualified
from fewtune.neurons.views import Kind, View
from fewtune.quantised import logical_shape


class AskModel:
    """The default of ``head``: the model is asked which module is its head."""

    def __repr__(self) -> str:
        return "<asked of the model>"


ASK_MODEL: Final = AskModel()

HeadSpec = str | Iterable[str] | None | AskModel


LAYERS: dict[str, dict[str, Kind]] = {"transformers.pytorch_utils.Conv1D": {"weight": "columns"}}
"""Class by module and qualified name -> its weights of neurons and how each is seen. Subclasses count; torch's own
classes are told in `weight_views`. A script may add a class; `roles.ROLES` has the roles of its other parameters."""


def weight_views(module: nn.Module) -> Iterator[tuple[str, View]]:
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
        case nn.modules.conv._ConvNd():
            yield from view("weight", groups=module.groups)
        case nn.Linear() | nn.Bilinear():
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
        case _ if listed := next((LAYERS[q] for c in type(module).__mro__ if (q := qualified(c)) in LAYERS), None):
            for attribute, kind in listed.items():
                yield from view(attribute, kind)
        case _ if is_experts(module):
            for attribute in EXPERT_WEIGHTS:
                if attribute in module._parameters:
                    yield from view(attribute, "experts transposed" if module.is_transposed else "experts")


def _shape(module: nn.Module, attribute: str) -> tuple[int, ...] | None:
    """Shape of an attribute; a parametrised one is computed once, in evaluation mode, which changes no state."""
    if not is_parametrized(module, attribute):
        weight = getattr(module, attribute, None)
        return None if weight is None else logical_shape(weight)
    steps: Any = module.parametrizations
    modes = [(step, step.training) for step in steps[attribute].modules()]
    try:
        steps[attribute].eval()
        with torch.no_grad():
            return tuple(getattr(module, attribute).shape)
    finally:
        for step, training in modes:
            step.training = training


def described(module: nn.Module) -> Iterator[tuple[nn.Module, str, View | Role]]:
    """Every parameter that a module holds, itself or through its parametrisations: (holder, attribute, what it is)."""
    views = dict(weight_views(module))
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


_UPDATED_IN_TRAINING = {f"timm.layers.evo_norm.EvoNorm2d{kind}" for kind in ("B0", "B1", "B2")}


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a module updates state in training mode: batch and instance normalisation, EvoNorm-B, spectral norm."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return bool(module.track_running_stats)
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return isinstance(module, _SpectralNorm) or not _UPDATED_IN_TRAINING.isdisjoint(classes)
