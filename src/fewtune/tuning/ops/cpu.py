"""The selected weight gradient of two matrices in plain torch: dV[o, k] = sum_n dY[n, o] X[n, slot[o, k]].

Two ways, the cheaper by `cost.py`:

    product   P = X^T dY over all columns of X (those that were kept), then P[slot[o, k], o]
    gather    gather X[:, slot], multiply by dY, add over n

Both work in blocks, so neither a whole dense gradient nor a gathered copy of the batch ever exists at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewtune.tuning.ops import cost

# Elements of one intermediate block: large enough to hide the cost of a call, small enough to be re-used by the
# allocator and to stay in cache (4 MB in float32).
BLOCK = 2**20


def selected_gradient(dy: Tensor, x: Tensor, slot: Tensor, rows: Tensor | None) -> Tensor:
    """dV of dY [N, O] and X [N, W].

    Args:
        dy: [N, O].
        x: [N, W], the kept columns of the layer's input.
        slot: [O, K] column of `x` for each connection, or [nnz] with `rows`.
        rows: [nnz] neuron of each connection, ascending, where neurons have different numbers of connections.

    Returns:
        Shaped as `slot`; float32 for half-precision inputs (accumulated in float32), else the inputs' dtype.
    """
    n, neurons = dy.shape
    dense = cost.product(n, neurons, x.shape[1])
    if dy.device.type == "cpu" and cost.gather(n, slot.numel(), ragged=rows is not None) < dense:
        return by_gather(dy, x, slot, rows)
    return by_product(dy, x, slot, rows)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which products of these tensors are added: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def by_product(dy: Tensor, x: Tensor, slot: Tensor, rows: Tensor | None) -> Tensor:
    """As `selected_gradient`: dense products over a block of neurons, gathered at once."""
    neurons, width = dy.shape[1], x.shape[1]
    step = max(128, BLOCK // width)
    if step >= neurons:
        return _pick(_transposed_product(x, dy), slot, rows, 0)
    if rows is None:
        blocks = [
            _pick(_transposed_product(x, dy[:, first : first + step]), slot[first : first + step], None, 0)
            for first in range(0, neurons, step)
        ]
        return torch.cat(blocks)
    gradient = dy.new_zeros(slot.shape, dtype=accumulator(dy, x))
    for first in range(0, neurons, step):
        block = _transposed_product(x, dy[:, first : first + step])
        inside = (rows >= first) & (rows < first + step)
        gradient = torch.where(inside, _pick(block, slot, rows, first), gradient)
    return gradient


def _pick(product: Tensor, slot: Tensor, rows: Tensor | None, first: int) -> Tensor:
    """product[slot, neuron - first] of a [W, neurons] product; entries of other neurons are arbitrary."""
    if rows is None:
        return product.gather(0, slot.t()).t().contiguous()
    return product[slot, (rows - first).clamp(0, product.shape[1] - 1)]


def _transposed_product(x: Tensor, dy: Tensor) -> Tensor:
    """X^T dY [W, O]. Of the two orders this one is the faster for few columns."""
    dtype = accumulator(dy, x)
    if x.dtype == dy.dtype == dtype:
        return x.t() @ dy
    if x.is_cuda and x.dtype == dy.dtype:
        return torch.mm(x.t(), dy, out_dtype=dtype)
    total = x.new_zeros(x.shape[1], dy.shape[1], dtype=dtype)
    step = max(256, BLOCK // max(x.shape[1], dy.shape[1]))
    for first in range(0, x.shape[0], step):
        total = torch.addmm(total, x[first : first + step].t().to(dtype), dy[first : first + step].to(dtype))
    return total


def by_gather(dy: Tensor, x: Tensor, slot: Tensor, rows: Tensor | None) -> Tensor:
    """As `selected_gradient`: gather, multiply and add over n, in blocks of n and of connections."""
    dtype = accumulator(dy, x)
    if rows is None:
        sums = [_gathered_sum(dy, x, slot[:, k], dtype) for k in range(slot.shape[1])]
        return torch.stack(sums, 1)
    step = max(1, 4 * BLOCK // max(1, min(x.shape[0], 2048)))
    sums = [
        _gathered_sum(dy, x, slot[first : first + step], dtype, rows[first : first + step])
        for first in range(0, slot.numel(), step)
    ]
    return torch.cat(sums)


def _gathered_sum(dy: Tensor, x: Tensor, slot: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """sum_n dY[n, o] X[n, slot[o]], or sum_n dY[n, rows[i]] X[n, slot[i]]: [len(slot)]."""
    total = dy.new_zeros(slot.shape, dtype=dtype)
    step = max(256, 2 * BLOCK // slot.numel())
    for first in range(0, x.shape[0], step):
        block = dy[first : first + step]
        if rows is not None:
            block = _columns(block, rows)
        total += (_columns(x[first : first + step], slot).to(dtype) * block).sum(0)
    return total


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """x[:, columns], read in the order of the rows of `x` (indexing reads it column by column: slower)."""
    return x.gather(1, columns.expand(x.shape[0], -1))
