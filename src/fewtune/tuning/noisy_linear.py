r"""The noisy linear layer, by three ways that differ in time alone.

.. math:: y_n = W_0 x_n + b_0 + z_n \odot (\Delta W x_n + \Delta b)

X' holds the hot columns of x, after a column of ones; C, of its shape, what their weights and the bias changed by. Of
dL/dW the selected entries alone are formed, from dY^T X'.

A batch at once, y = x W^T + b + (z - 1) (X' C^T): the outputs are swept three times more, which is little where an
image has few positions. An image at a time, y_n = x_n W^T + b + X'_n C_n^T with C_n = (z_n - 1) C: no sweep but the
thin products, and a C an image. Folded, y_n = x_n (W + C_n)^T + b_n: not even those, but a weight an image, which is
little where an image has more positions (in the first stages of a convolutional network) than a neuron has inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.tuning.functions import as_autocast, first_order, not_a_view
from fewtune.tuning.ops import SelectedPlaces, fused_gradients, fused_keep, fusible

# From so many positions an image on, for each hot column, an image at a time is faster; and for each input of a neuron,
# folded (two cores, AVX-512).
BY_IMAGE = 2
FOLDED = 2


def noisy_linear(
    x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, bias_start: Tensor | None,
    less_one: Tensor, places: SelectedPlaces,
) -> Tensor:  # fmt: skip
    """y [B, …, neurons] of x [B, …, fan_in].

    Args:
        x: the input.
        values: the selected weights, shaped as `places.hot_index`; `start`: as they were before tuning.
        weight: [neurons, fan_in], frozen, into which the values are written.
        bias: [neurons] or None; `bias_start`: as it was before tuning, None where it is frozen.
        less_one: z - 1, [B, 1, …, neurons].
        places: of the selected weights.
    """
    function = NoisyByImage if _positions(x) > BY_IMAGE * len(places.hot) else NoisyByBatch
    y: Tensor = function.apply(x, values, weight, bias, start, bias_start, less_one, places)
    return y


class NoisyByBatch(torch.autograd.Function):
    """y = x W^T + b + (z - 1) (X' C^T)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor,
        bias_start: Tensor | None, less_one: Tensor, places: SelectedPlaces,
    ) -> Tensor:  # fmt: skip
        change_of_bias = None if bias is None or bias_start is None else bias - bias_start
        x, cast_weight, bias, kept = _begun(ctx, x, values, weight, bias, places)
        change = _change(values - start, change_of_bias, kept.shape[1], places)
        less_one = less_one.to(x.dtype)
        y = F.linear(x.reshape(-1, x.shape[-1]), cast_weight, bias).view(*x.shape[:-1], places.neurons)
        y.addcmul_((kept @ change.t().to(x.dtype)).view_as(y), less_one)
        ctx.save_for_backward(kept, weight, start, change, less_one)
        return not_a_view(y)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, weight, start, change, less_one = ctx.saved_tensors
        places, (x_dtype, values_dtype, bias_dtype) = ctx.places, ctx.dtypes
        rows = dy.reshape(-1, dy.shape[-1])
        noisy = (dy * (1 + less_one)).reshape(rows.shape)  # dL/dy times z
        dx = None
        if ctx.needs_input_grad[0]:  # dY W_0 + (z dY) C
            dx = rows @ _with_entries(weight, start, places).to(dy.dtype)
            dx.index_add_(1, places.hot, noisy @ _inputs(change, places).to(dy.dtype))
            dx = dx.to(x_dtype).view(*dy.shape[:-1], weight.shape[1])
        if ctx.fused:
            dv, db = fused_gradients(noisy, kept, places)
        else:
            dv, db = _gradients(noisy.t() @ kept.to(dy.dtype), places)
        bias_gradient = db.to(bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, dv.to(values_dtype), None, bias_gradient, None, None, None, None


class NoisyByImage(torch.autograd.Function):
    """y_n = x_n W^T + b + X'_n C_n^T, or folded into one product x_n W_n^T + b_n; C_n = (z_n - 1) C."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor,
        bias_start: Tensor | None, less_one: Tensor, places: SelectedPlaces,
    ) -> Tensor:  # fmt: skip
        change_of_bias = None if bias is None or bias_start is None else bias - bias_start
        x, cast_weight, bias, kept = _begun(ctx, x, values, weight, bias, places)
        # In half precision a weight an image would have to be formed twice.
        ctx.folded = _positions(x) > FOLDED * x.shape[-1] and torch.finfo(x.dtype).bits >= 32
        change = _change(values - start, change_of_bias, kept.shape[1], places)
        less_one = less_one.view(len(x), -1, 1)
        moves = less_one * change  # C_n
        images, kept = x.reshape(len(x), -1, x.shape[-1]), kept.view(len(x), -1, kept.shape[1])
        if ctx.folded:
            weight = weight.expand(len(x), *weight.shape).index_add(2, places.hot, _inputs(moves, places))
            y = images @ weight.mT
            if bias is not None:
                y.add_(bias + moves[:, None, :, 0])
        else:
            y = F.linear(images.flatten(0, 1), cast_weight, bias).view(*images.shape[:2], -1)
            y.baddbmm_(kept, moves.mT.to(y.dtype))
        ctx.save_for_backward(kept, weight, change, less_one)
        return not_a_view(y.view(*x.shape[:-1], -1))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, weight, change, less_one = ctx.saved_tensors
        places, (x_dtype, values_dtype, bias_dtype) = ctx.places, ctx.dtypes
        images = dy.reshape(len(dy), -1, dy.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (images if ctx.folded else images.flatten(0, 1)) @ weight.to(dy.dtype)
            if not ctx.folded:
                moves = _inputs(less_one * change, places).to(dy.dtype)
                dx.index_add_(1, places.hot, (images @ moves).flatten(0, 1))
            dx = dx.to(x_dtype).view(*dy.shape[:-1], -1)
        products = images.mT @ kept.to(dy.dtype)
        dv, db = _gradients(((1 + less_one) * products).sum(0), places)
        bias_gradient = db.to(bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, dv.to(values_dtype), None, bias_gradient, None, None, None, None


def _positions(x: Tensor) -> int:
    """Of an image [B, …, fan_in]."""
    return math.prod(x.shape[1:-1])


def _begun(
    ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, places: SelectedPlaces
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What both functions begin with: x, the weight and the bias as autocast casts them, and X'."""
    ctx.dtypes, ctx.places = (x.dtype, values.dtype, None if bias is None else bias.dtype), places
    x, weight, bias = as_autocast(x, weight, bias)
    ctx.fused = fusible(x, weight, values, bias, places)
    return x, weight, bias, fused_keep(x, places) if ctx.fused else _with_ones(x, places)


def _inputs(change: Tensor, places: SelectedPlaces) -> Tensor:
    """What C holds of the weights, without the bias's column and those that fill it up."""
    return change[..., 1 : 1 + len(places.hot)]


def _with_ones(x: Tensor, places: SelectedPlaces) -> Tensor:
    hot = x.reshape(-1, x.shape[-1]).index_select(1, places.hot)
    return torch.cat([hot.new_ones(len(hot), 1), hot], dim=1)


def _change(change: Tensor, of_bias: Tensor | None, width: int, places: SelectedPlaces) -> Tensor:
    """C [neurons, width]."""
    whole = change.new_zeros(places.neurons, width)
    if places.rows is None:
        whole.scatter_(1, 1 + places.hot_index, change)
    else:
        whole[places.rows, 1 + places.hot_index] = change
    if of_bias is not None:
        whole[:, 0] = of_bias
    return whole


def _with_entries(weight: Tensor, entries: Tensor, places: SelectedPlaces) -> Tensor:
    """A weight [neurons, fan_in] with other selected entries."""
    entries = entries.to(weight.dtype)
    if places.rows is None:
        return weight.scatter(1, places.columns, entries)
    return weight.index_put((places.rows, places.columns), entries)


def _gradients(product: Tensor, places: SelectedPlaces) -> tuple[Tensor, Tensor]:
    """Those of the values, shaped as `places.hot_index`, and of the bias: from dY^T X' [neurons, 1 + hot columns]."""
    hot = product[:, 1:]
    picked = hot.gather(1, places.hot_index) if places.rows is None else hot[places.rows, places.hot_index]
    return picked, product[:, 0].clone()
