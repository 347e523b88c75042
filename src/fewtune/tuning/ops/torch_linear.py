"""The selected weight gradient of two matrices in plain torch: dV[o, k] = sum_n dY[n, o] X[n, column[o, k]].

Three ways, of which `linear.py` takes the cheapest by `cost.py`; off the CPU always the product:

    product   P = X^T dY over all columns of what was kept, then P[column[o, k], o]
    gather    for each connection: gather its column, multiply by dY, add over n
    mixture   a product over the columns that many neurons use, the rest by gather

All work in blocks, so neither a whole dense gradient nor a gathered copy of the batch ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one intermediate block: large enough to hide the cost of a call, small enough to be re-used by the
# allocator and to stay in cache (4 MB in float32).
BLOCK = 2**20


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which products of these tensors are added: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def by_product(dy: Tensor, x: Tensor, column: Tensor, rows: Tensor | None) -> Tensor:
    """P = X^T dY, then P[column[o, k], o]: over blocks of neurons, each gathered at once.

    Args:
        dy: [N, O].
        x: [N, W] of the input's columns.
        column: [O, K] column of `x` for each connection, or [nnz] with `rows`.
        rows: [nnz] neuron of each connection, ascending, where neurons have different numbers of connections.

    Returns:
        Shaped as `column`; float32 for half-precision inputs (accumulated in float32), else the inputs' dtype.
    """
    neurons, width, dtype = dy.shape[1], x.shape[1], accumulator(dy, x)
    if not width:
        return dy.new_zeros(column.shape, dtype=dtype)
    step = max(128, BLOCK // width)
    blocks, gradient = [], dy.new_zeros(column.shape, dtype=dtype) if rows is not None and step < neurons else None
    for first in range(0, neurons, step):
        block = dy if step >= neurons else dy[:, first : first + step]
        # Of the two orders this one is the faster for few columns.
        product = x.t() @ block if x.dtype == block.dtype == dtype else _mixed_product(x, block, dtype)
        if rows is None:
            blocks.append(product.gather(0, column[first : first + step].t()).t().contiguous())
        elif gradient is None:
            return product[column, rows]
        else:
            picked = product[column, (rows - first).clamp(0, product.shape[1] - 1)]
            gradient = torch.where((rows >= first) & (rows < first + step), picked, gradient)
    if gradient is not None:
        return gradient
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _mixed_product(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """X^T dY [W, O] of half-precision matrices, added in `dtype`."""
    if x.is_cuda and x.dtype == dy.dtype:
        return torch.mm(x.t(), dy, out_dtype=dtype)
    total = x.new_zeros(x.shape[1], dy.shape[1], dtype=dtype)
    step = max(256, BLOCK // max(x.shape[1], dy.shape[1]))
    for first in range(0, x.shape[0], step):
        total = torch.addmm(total, x[first : first + step].t().to(dtype), dy[first : first + step].to(dtype))
    return total


def by_mixture(
    dy: Tensor,
    x: Tensor,
    common: Tensor,
    hot_index: Tensor,
    rows: Tensor | None,
    rare_column: Tensor,
    rare: Tensor,
    rare_rows: Tensor,
) -> Tensor:
    """`by_product` over the common columns; the rare connections one by one.

    Args:
        dy, x: [N, O] and [N, W].
        common: [N, C] the common columns.
        hot_index, rows: [O, K] position among the common columns, anything from C on for rare connections; or [nnz].
        rare_column: [R] column of `x` for each rare connection.
        rare, rare_rows: see `SelectedPlaces`.
    """
    gradient = by_product(dy, common, hot_index.clamp(max=max(common.shape[1] - 1, 0)), rows)
    if not rare.numel():
        return gradient
    others = gathered_sum(dy, x, rare_column, gradient.dtype, rare_rows)
    return gradient.flatten().index_copy(0, rare, others).view_as(gradient)


def by_gather(dy: Tensor, x: Tensor, column: Tensor, rows: Tensor | None) -> Tensor:
    """Gather, multiply and add over n, in blocks of n and of connections; arguments as in `by_product`."""
    dtype = accumulator(dy, x)
    if rows is None:
        sums = [gathered_sum(dy, x, column[:, k], dtype) for k in range(column.shape[1])]
        return torch.stack(sums, 1)
    step = max(1, 4 * BLOCK // max(1, min(x.shape[0], 2048)))
    sums = [
        gathered_sum(dy, x, column[first : first + step], dtype, rows[first : first + step])
        for first in range(0, column.numel(), step)
    ]
    return torch.cat(sums)


def gathered_sum(dy: Tensor, x: Tensor, column: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """sum_n dY[n, o] X[n, column[o]], or sum_n dY[n, rows[i]] X[n, column[i]]: [len(column)]."""
    total = dy.new_zeros(column.shape, dtype=dtype)
    step = max(256, 2 * BLOCK // column.numel())
    for first in range(0, x.shape[0], step):
        block = dy[first : first + step]
        if rows is not None:
            block = columns(block, rows)
        total += columns(x[first : first + step], column).to(dtype).mul_(block).sum(0)
    return total


def columns(x: Tensor, chosen: Tensor) -> Tensor:
    """x[:, chosen], copied; `gather` reads `x` row by row, indexing column by column, which is slower."""
    return x.gather(1, chosen.expand(x.shape[0], -1))
