"""Forward passes of stock Linear and convolution layers whose dense weight gradient is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.tuning.functions import SelectedConv, SelectedLinear, kept_anyway, recorded
from fewtune.tuning.ops import ConvShape, conv_form

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fast_forward(base: type[nn.Module]) -> Callable[..., Tensor] | None:
    """The fast forward pass for a layer class whose forward is the stock one; None for all others."""
    if issubclass(base, nn.Linear) and base.forward is nn.Linear.forward:
        return _linear_forward
    for stock in CONVOLUTIONS:
        if issubclass(base, stock) and base.forward is stock.forward and base._conv_forward is stock._conv_forward:
            return _conv_forward
    return None


def _saved_elsewhere(x: Tensor) -> bool:
    # A compiler decides for itself what it saves.
    return not torch.compiler.is_compiling() and kept_anyway(x)


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    values, tensor = self._parameters["weight_selected"], self._fewtune.tuned["weight"]
    if not recorded(values) or not _plain(x) or not _made_for(tensor, 1):
        return F.linear(x, self.weight, self.bias)
    if self._fewtune.noise is not None and self.training:
        return self._fewtune.noise.linear(self, x)
    weight = self._fewtune_frozen("weight")
    return SelectedLinear.apply(x, tensor.weights(values), weight, self.bias, tensor.places, _saved_elsewhere(x))


def _conv_forward(self: Any, x: Tensor) -> Tensor:
    values, tensor = self._parameters["weight_selected"], self._fewtune.tuned["weight"]
    batched = x.ndim == len(self.kernel_size) + 2
    if not recorded(values) or not (batched and _plain(x) and _made_for(tensor, self.groups)):
        return self._conv_forward(x, self.weight, self.bias)
    noise = self._fewtune.noise if self.training else None
    y: Tensor
    if self.padding_mode == "zeros" and not isinstance(self.padding, str):
        shape = ConvShape.of(self)
        if noise is not None and shape.pointwise:
            return noise.pointwise(self, x)  # type: ignore[no-any-return]
        weight = self._fewtune_frozen("weight")
        form = "whole" if _saved_elsewhere(x) else conv_form(tensor.places, shape, x.shape)
        y = SelectedConv.apply(x, tensor.weights(values), weight, self.bias, tensor.places, shape, form)
    else:
        y = self._conv_forward(x, self.weight, self.bias)
    return y if noise is None else noise.conv(self, x, y)


def _made_for(tensor: Any, groups: int) -> bool:
    """Whether a tensor's places were made for a layer such as this: a tied weight's first owner may be another kind."""
    return tensor.view.kind == "rows" and tensor.places.groups == groups


def _plain(x: Tensor) -> bool:
    """Whether x is a dense tensor, no subclass with rules of its own (nested tensors, for instance)."""
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_nested
