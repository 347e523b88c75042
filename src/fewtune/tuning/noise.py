r"""Noise on what tuning has changed, in training alone (Ni, Zhang and Koniusz, PACE, NeurIPS 2024).

.. math:: y = W_0 x + b_0 + z \odot (\Delta W x + \Delta b), \qquad z \sim \mathcal N(1, \sigma_l^2)

with one z a sample and channel, and sigma_l falling linearly with depth: sigma at the first tuned layer, sigma / L at
the last of L (PACE: a block at a time, from the second block on). The frozen weight holds W_0 + dW, so the layer
computes y = W x + b + (z - 1) (dW x + db), of which the second product has the hot columns alone. The mean over z is
the plain output, z = 1 in evaluation, and nothing of it is in a task file. Depthwise convolutions have no noise (PACE
has linear layers alone): a second one over all channels would take longer than all other noise of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewtune.errors import TuningError
from fewtune.tuning.forwards import CONVOLUTIONS, fast_forward
from fewtune.tuning.functions import recorded
from fewtune.tuning.noisy_linear import noisy_linear
from fewtune.tuning.tensors import SELECTED
from fewtune.tuning.tuner import Tuner


@dataclass(eq=False)
class Noise:
    """Of one layer: its sigma, and the weight's selected entries and the bias as they were (None: it is frozen)."""

    sigma: float
    start: Tensor
    bias_start: Tensor | None
    met: bool = False
    hook: RemovableHandle | None = None

    def remove(self) -> None:
        """With the layer's class its hook goes."""
        if self.hook is not None:
            self.hook.remove()

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """The noisy output of a linear layer; x [B, …, fan_in]."""
        tensor, values = layer._fewtune.tuned["weight"], layer._parameters["weight_selected"]
        less_one = self._draw(x, (len(x), *[1] * (x.ndim - 2), tensor.places.neurons))
        weight, start = layer._fewtune_frozen("weight").flatten(1), self.start.to(values)
        bias_start = None if self.bias_start is None else self.bias_start.to(values)
        entries = tensor.weights(values)
        return noisy_linear(x, entries, weight, layer.bias, start, bias_start, less_one, tensor.places)

    def pointwise(self, layer: Any, x: Tensor) -> Tensor:
        """The noisy output of a pointwise convolution, of x [B, channels, …]."""
        return self.linear(layer, x.movedim(1, -1)).movedim(-1, 1)

    def conv(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """The noisy output of another convolution, of x [B, channels, …] and its plain output y."""
        tensor, values = layer._fewtune.tuned["weight"], layer._parameters["weight_selected"]
        less_one = self._draw(x, (len(x), tensor.places.neurons, *[1] * (x.ndim - 2)))
        dense, bias = self._dense(layer, values)
        channels = tensor.places.hot_channels
        if layer.groups == 1 and len(channels) < x.shape[1]:
            x, dense = x.index_select(1, channels), dense.index_select(1, channels)
        return y + less_one * layer._conv_forward(x, dense.to(x.dtype), bias)

    def other(self, layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The noisy output of a convolution with a forward of its own (timm's Conv2dSame), as its forward hook."""
        values = layer._parameters["weight_selected"]
        if not layer.training or not recorded(values):
            return y
        if not self.met:
            bias = None if layer.bias is None else 2 * layer.bias.detach()
            twice = _run(layer, inputs, 2 * layer.weight.detach(), bias)
            if not torch.allclose(twice, 2 * y, rtol=1e-3, atol=1e-4 * float(y.detach().abs().max())):
                raise TuningError(
                    f"noise: {type(layer).__name__} is not linear in its weight, which is standardised or normalised; "
                    "take noise=0, or exclude it"
                )
        dense, shift = self._dense(layer, values)
        less_one = self._draw(y, (len(y), y.shape[1], *[1] * (y.ndim - 2)))
        return y + less_one * _run(layer, inputs, dense.to(inputs[0].dtype), shift)

    def _dense(self, layer: Any, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """dW, in the weight's shape, and db."""
        tensor, shape = layer._fewtune.tuned["weight"], layer._parameters["weight"].shape
        change = tensor.weights(values) - self.start.to(values)
        dense = values.new_zeros(shape.numel()).scatter(0, tensor.index.view(-1), change.view(-1)).view(shape)
        return dense, None if self.bias_start is None else layer.bias - self.bias_start.to(values)

    def _draw(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """z - 1."""
        self.met = True
        return torch.randn(shape, dtype=x.dtype, device=x.device) * self.sigma


def _run(layer: Any, inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's own forward with another weight and bias."""
    base = layer._fewtune.base
    plain = base.__new__(base)
    plain.__dict__ = {key: value for key, value in layer.__dict__.items() if key != "_fewtune"}
    plain.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    y: Tensor = base.forward(plain, *inputs)
    return y


def add_noise(tuner: Tuner, sigma: float) -> None:
    """From now on what has changed of the tuned linear layers and convolutions is noisy in training mode.

    Depthwise convolutions stay plain.

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
    chosen = [(name, t) for name, t in trained.items() if t.suffix == SELECTED and not _depthwise(t.owners[0].module)]
    held: dict[str, Noise] = {}
    for depth, (name, t) in enumerate(chosen):
        for owner in t.owners:
            module: Any = owner.module
            stock = fast_forward(module._fewtune.base) is not None
            if owner.attribute != "weight" or not (stock or isinstance(module, CONVOLUTIONS)):
                raise TuningError(
                    f"noise: {name} is the weight of {module._fewtune.base.__name__}.{owner.attribute}; expected stock "
                    "linear layers and convolutions; take noise=0, or exclude it"
                )
            bias = biases.get((id(module), "bias"))
            start = t.before if bias is None else bias.before
            noise = Noise(sigma * (1 - depth / len(chosen)), t.before, None if bias is None else start)
            module._fewtune.noise = held[name] = noise
            if not stock:
                noise.hook = module.register_forward_hook(noise.other)
    _once_called(tuner.model, held)


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1


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
