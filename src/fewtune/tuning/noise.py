r"""Noise on what tuning has changed, in training alone (Ni, Zhang and Koniusz, PACE, NeurIPS 2024).

.. math:: y = W_0 x + b_0 + z \odot (\Delta W x + \Delta b), \qquad z \sim \mathcal N(1, \sigma_l^2)

with one z a sample and channel, and sigma_l falling linearly with depth: sigma at the first tuned layer, sigma / L at
the last of L (PACE: a block at a time, from the second block on). The frozen weight holds W_0 + dW, so the layer
computes y = W x + b + (z - 1) (dW x + db), of which the second product has the hot columns alone. The mean over z is
the plain output, z = 1 in evaluation, and nothing of it is in a task file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.errors import TuningError
from fewtune.tuning.forwards import fast_forward
from fewtune.tuning.functions import as_autocast, first_order, not_a_view
from fewtune.tuning.ops import SelectedPlaces
from fewtune.tuning.tensors import SELECTED
from fewtune.tuning.tuner import Tuner


@dataclass(eq=False)
class Noise:
    """Of one layer: its sigma, and the weight's selected entries and the bias as they were (None: it is frozen)."""

    sigma: float
    start: Tensor
    bias_start: Tensor | None
    met: bool = False

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """The noisy output of a linear layer; x [B, …, fan_in]."""
        tensor, values = layer._fewtune.tuned["weight"], layer._parameters["weight_selected"]
        less_one = self._draw(x, (len(x), *[1] * (x.ndim - 2), tensor.places.neurons))
        weight, start = layer._fewtune_frozen("weight"), self.start.to(values)
        bias_start = None if self.bias_start is None else self.bias_start.to(values)
        entries = tensor.weights(values)
        return NoisyLinear.apply(x, entries, weight, layer.bias, start, bias_start, less_one, tensor.places)

    def conv(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """The noisy output of a convolution, of x [B, channels, …] and its plain output y."""
        tensor, values = layer._fewtune.tuned["weight"], layer._parameters["weight_selected"]
        less_one = self._draw(x, (len(x), tensor.places.neurons, *[1] * (x.ndim - 2)))
        weight = layer._parameters["weight"]
        change = tensor.weights(values) - self.start.to(values)
        dense = values.new_zeros(weight.numel()).scatter(0, tensor.index.view(-1), change.view(-1)).view(weight.shape)
        channels = tensor.places.hot_channels
        if layer.groups == 1 and len(channels) < x.shape[1]:
            x, dense = x.index_select(1, channels), dense.index_select(1, channels)
        bias = None if self.bias_start is None else layer.bias - self.bias_start.to(values)
        return y + less_one * layer._conv_forward(x, dense.to(x.dtype), bias)

    def _draw(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """z - 1."""
        self.met = True
        return torch.randn(shape, dtype=x.dtype, device=x.device) * self.sigma


class NoisyLinear(torch.autograd.Function):
    """y = x W^T + b + (z - 1) (x dW^T + db); of dL/dW the selected entries alone are formed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor,
        bias_start: Tensor | None, less_one: Tensor, places: SelectedPlaces,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = x.dtype, values.dtype, None if bias is None else bias.dtype
        change = values.new_zeros(places.neurons, len(places.hot))
        if places.rows is None:
            change.scatter_(1, places.hot_index, values - start)
        else:
            change[places.rows, places.hot_index] = values - start
        shift = None if bias is None or bias_start is None else bias - bias_start
        x, cast_weight, bias = as_autocast(x, weight, bias)
        hot, change, less_one = x[..., places.hot], change.to(x.dtype), less_one.to(x.dtype)
        y = F.linear(x, cast_weight, bias)
        y.addcmul_(F.linear(hot, change, None if shift is None else shift.to(x.dtype)), less_one)
        ctx.save_for_backward(hot, weight, change, less_one)
        ctx.places = places
        return not_a_view(y)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        hot, weight, change, less_one = ctx.saved_tensors
        places, (x_dtype, values_dtype, bias_dtype) = ctx.places, ctx.dtypes
        extra = dy * less_one
        rows, noisy = dy.reshape(-1, dy.shape[-1]), (dy + extra).reshape(-1, dy.shape[-1])
        dx = dv = db = None
        if ctx.needs_input_grad[0]:
            dx = rows @ weight.to(dy.dtype)
            dx.index_add_(1, places.hot, extra.reshape(rows.shape) @ change.to(dy.dtype))
            dx = dx.to(x_dtype).view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            product = noisy.t() @ hot.reshape(len(rows), -1).to(dy.dtype)
            dv = product.gather(1, places.hot_index) if places.rows is None else product[places.rows, places.hot_index]
            dv = dv.to(values_dtype)
        if ctx.needs_input_grad[3]:
            db = noisy.sum(0, dtype=bias_dtype)
        return dx, dv, None, db, None, None, None, None


def add_noise(tuner: Tuner, sigma: float) -> None:
    """From now on what has changed of the tuned linear layers and convolutions is noisy in training mode.

    Args:
        tuner: of `fewtune.attach`.
        sigma: of the first tuned layer. 0 changes nothing, to the bit.

    Raises:
        TuningError: a selected weight is not that of a stock linear layer or convolution; raised by the first forward
            pass in training mode where the model uses a weight without calling its layer.
    """
    if sigma == 0:
        return
    trained = tuner._trained
    biases = {(id(o.module), o.attribute): t for t in trained.values() for o in t.owners}
    chosen = [(name, t) for name, t in trained.items() if t.suffix == SELECTED]
    held: dict[str, Noise] = {}
    for depth, (name, t) in enumerate(chosen):
        for owner in t.owners:
            module: Any = owner.module
            if owner.attribute != "weight" or fast_forward(module._fewtune.base) is None or t.tensor.ndim < 2:
                raise TuningError(
                    f"noise: {name} is the weight of {module._fewtune.base.__name__}.{owner.attribute}; expected stock "
                    "linear layers and convolutions; take noise=0, or exclude it"
                )
            bias = biases.get((id(module), "bias"))
            start = t.before if bias is None else bias.before
            noise = Noise(sigma * (1 - depth / len(chosen)), t.before, None if bias is None else start)
            module._fewtune.noise = held[name] = noise
    _once_called(tuner.model, held)


def _once_called(model: nn.Module, held: dict[str, Noise]) -> None:
    """After the first forward pass in training mode, that every layer was met."""

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        handle.remove()
        if missed := [name for name, noise in held.items() if not noise.met]:
            raise TuningError(
                f"noise: the model uses {missed[0]} without calling its layer, or not as a dense tensor; take noise=0, "
                "or exclude it"
            )

    handle = model.register_forward_hook(look)
