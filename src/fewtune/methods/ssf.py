"""SSF (Lian et al. 2022): the output of every layer and normalisation is scaled and shifted, y = gamma * x + beta.

Behind every linear layer, convolution and normalisation of the image encoder that has a bias; scale and shift begin
near one and zero (normal, standard deviation 0.02), as published. A layer without a bias (Swin's reduction) gets none,
in SSF's code as here. So the two fold exactly into the weights:

    gamma * (W x + b) + beta = (gamma * W) x + (gamma * b + beta).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.methods.base import Excluding
from fewtune.methods.blocks import find_blocks, find_trunk, lineage
from fewtune.methods.inserted import Added, Modules, inserting, place, where_allowed
from fewtune.neurons import Anatomy, Role

DEVIATION = 0.02
ATTRIBUTE = "fewtune_ssf"
NORM_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"
"""A normalisation, a dropout and an activation in one module, in this order."""


class ScaleShift(nn.Module):
    """gamma * x + beta over the channels, whose axis is `axis`."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))
        self.axis = axis
        nn.init.normal_(self.scale, mean=1.0, std=DEVIATION)
        nn.init.normal_(self.shift, std=DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape with the channels on `axis`."""
        behind = (1,) * (x.ndim - 1 - self.axis if self.axis >= 0 else 0)
        return x * self.scale.view(-1, *behind) + self.shift.view(-1, *behind)


def scaled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """The forward hook: the layer's output, scaled and shifted."""
    result: Tensor = getattr(module, ATTRIBUTE)(output)
    return result


@dataclass(frozen=True)
class SSF(Modules):
    """Scale and shift. exclude: glob patterns of modules whose outputs are left as they are."""

    exclude: tuple[str, ...] = ()

    name: ClassVar = "ssf"

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """One pair behind every layer and normalisation of the image encoder, the head aside.

        Raises:
            ModelError: the image encoder is not known.
        """
        find_blocks(model, self.name)
        added: dict[str, nn.Module] = {}
        for name, layer in where_allowed(anatomy, self.exclude, dict(served(model, anatomy))).items():
            bias, (where, owner) = layer.bias, before_activation(name, layer)
            assert isinstance(bias, Tensor)
            added |= place(owner, where, ATTRIBUTE, ScaleShift(len(bias), channel_axis(layer)), scaled, like=layer)
        return Added(added)

    def fold(self, model: nn.Module, anatomy: Anatomy, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights and biases with scale and shift worked in."""
        folded: dict[str, Tensor] = {}
        for name, layer in served(model, anatomy):
            pair = before_activation(name, layer)[1]._modules.get(ATTRIBUTE)
            if pair is None:
                continue
            assert isinstance(pair, ScaleShift)
            weight, bias = (f"{name}.{attribute}" if name else attribute for attribute in ("weight", "bias"))
            scale, shift = pair.scale.detach(), pair.shift.detach()
            view = anatomy.views.get(weight)
            if view is None:  # a normalisation
                folded[weight] = plain[weight] * scale
            else:
                folded[weight] = view.stored(view.matrix(plain[weight]) * scale[:, None])
            folded[bias] = plain[bias] * scale + shift
        return folded


def served(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """The layers and normalisations of the image encoder that have weight and bias, head aside: name, module."""
    prefix, trunk = find_trunk(model, SSF.name)
    norms = set(anatomy.named(Role.NORM))
    for inner, module in trunk.named_modules():
        name = ".".join(part for part in (prefix, inner) if part)
        weight = f"{name}.weight" if name else "weight"
        if module._parameters.get("bias") is not None and (weight in anatomy.views or weight in norms):
            yield name, module


def before_activation(name: str, layer: nn.Module) -> tuple[str, nn.Module]:
    """The module whose output is scaled, and its name: the layer, or its part before an activation within it."""
    if NORM_ACTIVATION in lineage(layer):
        return f"{name}.drop", layer.get_submodule("drop")
    return name, layer


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in a layer's output; of a normalisation it is tried out on a small input."""
    if isinstance(layer, nn.Linear):
        return -1
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1
    weight = layer.weight
    assert isinstance(weight, Tensor)
    width = len(weight)
    small = tuple(size for size in (2, 3, 4, 5) if size != width)[:2]  # not to be taken for channels
    for axis, shape in ((-1, (1, *small, width)), (1, (1, width, *small))):
        try:
            with torch.no_grad():
                output = layer(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
        except (RuntimeError, ValueError, IndexError):
            continue
        if output.shape == shape:
            return axis
    raise ModelError(f"ssf does not know where the channels of {type(layer).__name__} lie")


SSF_METHOD = inserting("ssf", Excluding, lambda s: SSF(s.exclude), SSF, starts_plain=False)  # its scales are drawn
