"""`fewtune::selected_gradient` as a custom operator, so that `torch.compile(fullgraph=True)` sees one opaque node.

The choice between ways of computing it (torch on any device, Triton on CUDA) is made inside, by shape and device.
Eager code calls the same function without the operator's overhead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewtune.tuning.ops import torch_conv, torch_linear, triton
from fewtune.tuning.ops.places import SelectedPlaces


def selected_gradient(dy: Tensor, x: Tensor, places: SelectedPlaces, hot: Tensor | None) -> Tensor:
    """dV[o, k] = sum_n dY[n, o] X[n, column[o, k]], see `torch_linear.selected_gradient`; differentiable once more."""
    function = _operator if torch.compiler.is_compiling() or _recorded(dy, x) else _best
    return function(dy, x, places.slot, places.rows, hot, places.common, places.rare, places.rare_rows)


def conv_gradient(
    dy: Tensor,
    kept: Tensor,
    slot: Tensor,
    rows: Tensor | None,
    channel: Tensor | None,
    tap: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same of a convolution, see `torch_conv.selected_gradient`; not differentiable again."""
    function = _conv_operator if torch.compiler.is_compiling() else torch_conv.selected_gradient
    return function(dy, kept, slot, rows, channel, tap, kernel_size, stride, padding, dilation, groups)


def _recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with these tensors (a backward pass with create_graph=True)."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _best(
    dy: Tensor,
    x: Tensor,
    slot: Tensor,
    rows: Tensor | None,
    hot: Tensor | None,
    common: int,
    rare: Tensor,
    rare_rows: Tensor,
) -> Tensor:
    if rows is None and triton.usable(dy, x):
        return triton.selected_gradient(dy, x, slot if hot is None else hot[slot])
    return torch_linear.selected_gradient(dy, x, slot, rows, hot, common, rare, rare_rows)


_operator = torch.library.custom_op("fewtune::selected_gradient", _best, mutates_args=())


@_operator.register_fake
def _(dy: Tensor, x: Tensor, slot: Tensor, *others: object) -> Tensor:
    return dy.new_empty(slot.shape, dtype=torch_linear.accumulator(dy, x))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """dV is bilinear in dY and X: with G [O, W] = `gradient` scattered, d(dY) = X G^T and dX = dY G."""
    dy, x, slot, rows, hot = ctx.saved_tensors
    if rows is None:
        rows = torch.arange(dy.shape[1], device=dy.device)[:, None].expand_as(slot)
    scattered = gradient.new_zeros(dy.shape[1], x.shape[1])
    scattered = scattered.index_put((rows, slot if hot is None else hot[slot]), gradient, accumulate=True)
    by_dy = (x.to(gradient.dtype) @ scattered.t()).to(dy.dtype)
    by_x = (dy.to(gradient.dtype) @ scattered).to(x.dtype)
    return by_dy, by_x, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fewtune::conv_selected_gradient", mutates_args=())
def _conv_operator(
    dy: Tensor,
    kept: Tensor,
    slot: Tensor,
    rows: Tensor | None,
    channel: Tensor | None,
    tap: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    numbers = (kernel_size, stride, padding, dilation, groups)
    return torch_conv.selected_gradient(dy, kept, slot, rows, channel, tap, *numbers)


@_conv_operator.register_fake
def _(dy: Tensor, kept: Tensor, slot: Tensor, *others: object) -> Tensor:
    return dy.new_empty(slot.shape, dtype=torch_linear.accumulator(dy, kept))
