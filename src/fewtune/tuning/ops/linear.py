"""The selected weight gradient of a linear layer: dV[o, k] = sum_n dY[n, o] X[n, index[o, k]].

It is also the custom operator `fewtune::selected_gradient`, so that `torch.compile(fullgraph=True)` sees one opaque
node. Eager code calls the same function without the operator's overhead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewtune.tuning.ops import cost, triton
from fewtune.tuning.ops.places import SelectedPlaces
from fewtune.tuning.ops.torch_linear import accumulator, by_gather, by_mixture, by_product, columns


def linear_keep(x: Tensor, places: SelectedPlaces, *, keep_whole: bool = False) -> Tensor:
    """What the forward pass saves of its input for `linear_selected_gradient`.

    Args:
        x: the layer's input, [..., fan_in].
        places: the selected connections.
        keep_whole: something else keeps `x` anyway, so a copy of columns would be kept beside it.

    Returns:
        The hot columns as a tensor of their own [N, H] (N: the product of the leading dimensions) where
        H <= KEEP_SHARE * fan_in and not `keep_whole`; else `x` itself.
    """
    if keep_whole or not places.keeps_columns:
        return x
    return columns(x.reshape(-1, x.shape[-1]), places.hot)


def linear_selected_gradient(
    grad_output: Tensor, kept: Tensor, places: SelectedPlaces, *, keep_whole: bool | None = None
) -> Tensor:
    """The gradient of a linear layer's selected connections; differentiable once more.

    Args:
        grad_output: dL/dy, [..., neurons].
        kept: what `linear_keep` returned.
        places: the selected connections.
        keep_whole: as given to `linear_keep`; left out, what was kept is told by its shape, on which a compiler that
            takes sizes for unknown cannot decide.

    Returns:
        [neurons, K], or [nnz] where rows differ; float32 for half-precision inputs, else the inputs' dtype.
    """
    dy = grad_output.reshape(-1, grad_output.shape[-1])
    x = kept.reshape(-1, kept.shape[-1])
    if keep_whole is None:
        whole = x.shape[1] == places.fan_in
    else:
        whole = keep_whole or not places.keeps_columns
    hot = places.hot if whole else None
    return _function(dy, x)(
        dy, x, places.hot_index, places.rows, hot, places.common, places.rare, places.rare_rows
    )  # fmt: skip


def hot_columns_gradient(dy: Tensor, x: Tensor, places: SelectedPlaces) -> Tensor:
    """The same of matrices dY [N, neurons] and X [N, H], which holds the hot columns and nothing else."""
    return _function(dy, x)(
        dy, x, places.hot_index, places.rows, None, places.common, places.rare, places.rare_rows
    )  # fmt: skip


def _function(dy: Tensor, x: Tensor) -> Callable[..., Tensor]:
    """The operator where a compiler, or autograd in a backward pass with create_graph=True, must see the gradient."""
    recorded = torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad)
    return _operator if torch.compiler.is_compiling() or recorded else _selected_gradient


def _selected_gradient(
    dy: Tensor,
    x: Tensor,
    hot_index: Tensor,
    rows: Tensor | None,
    hot: Tensor | None,
    common: int,
    rare: Tensor,
    rare_rows: Tensor,
) -> Tensor:
    """dV of dY [N, O] and what was kept of X, by the way that is cheapest for their shapes and device.

    Args:
        dy: [N, O].
        x: [N, H] hot columns, or [N, fan_in], the whole input, with `hot`.
        hot_index: [O, K] position among the hot columns of each connection's column, or [nnz] with `rows`.
        rows: [nnz] neuron of each connection, ascending, where neurons have different numbers of connections.
        hot: [H] hot columns, where `x` is the whole input.
        common, rare, rare_rows: see `SelectedPlaces`.

    Returns:
        Shaped as `hot_index`; float32 for half-precision inputs (accumulated in float32), else the inputs' dtype.
    """
    column = hot_index if hot is None else hot[hot_index]
    if rows is None and triton.usable(dy, x):
        return triton.selected_gradient(dy, x, column)
    if dy.device.type != "cpu":  # where products are cheap and every call costs a launch
        return by_product(dy, x, column, rows)
    n, neurons = dy.shape
    copied = 0.0 if hot is None else cost.columns(n, common)
    mixture = copied + cost.product(n, neurons, common) + cost.rare(n, neurons, rare.numel())
    product = cost.product(n, neurons, x.shape[1])
    if cost.gather(n, hot_index.numel(), ragged=rows is not None) <= min(mixture, product):
        return by_gather(dy, x, column, rows)
    if product < mixture:
        return by_product(dy, x, column, rows)
    first = x[:, :common] if hot is None else columns(x, hot[:common])
    return by_mixture(dy, x, first, hot_index, rows, column.flatten()[rare], rare, rare_rows)


_operator = torch.library.custom_op("fewtune::selected_gradient", _selected_gradient, mutates_args=())


@_operator.register_fake
def _(dy: Tensor, x: Tensor, hot_index: Tensor, *others: object) -> Tensor:
    return dy.new_empty(hot_index.shape, dtype=accumulator(dy, x))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    """dV is bilinear in dY and X: with G [O, W] = `gradient` scattered, d(dY) = X G^T and dX = dY G."""
    dy, x, hot_index, rows, hot = ctx.saved_tensors
    if rows is None:
        rows = torch.arange(dy.shape[1], device=dy.device)[:, None].expand_as(hot_index)
    scattered = gradient.new_zeros(dy.shape[1], x.shape[1])
    scattered = scattered.index_put(
        (rows, hot_index if hot is None else hot[hot_index]), gradient, accumulate=True
    )  # fmt: skip
    by_dy = (x.to(gradient.dtype) @ scattered.t()).to(dy.dtype)
    by_x = (dy.to(gradient.dtype) @ scattered).to(x.dtype)
    return by_dy, by_x, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)
