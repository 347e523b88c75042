"""The selected weight gradient of two matrices in plain torch: dV[o, k] = sum_n dY[n, o] X[n, column[o, k]].

The cheapest by `cost.py` of three ways:

    mixed     P = X^T dY over the columns that many neurons use, then P[slot[o, k], o]; the rest as in `gather`
    gather    for each connection: gather its column, multiply by dY, add over n
    dense     P = X^T dY over all columns of the whole input, then P[column[o, k], o]

All work in blocks, so neither a whole dense gradient nor a gathered copy of the batch ever exists at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewtune.tuning.ops import cost, matmul

# Elements of one intermediate block: large enough to hide the cost of a call, small enough to be re-used by the
# allocator and to stay in cache (4 MB in float32).
BLOCK = 2**20


def selected_gradient(
    dy: Tensor,
    x: Tensor,
    slot: Tensor,
    rows: Tensor | None,
    hot: Tensor | None,
    common: int,
    rare: Tensor,
    rare_rows: Tensor,
) -> Tensor:
    """dV of dY [N, O] and the columns X that were kept.

    Args:
        dy: [N, O].
        x: [N, H] hot columns, or [N, fan_in], the whole input, with `hot`.
        slot: [O, K] position among the hot columns for each connection, or [nnz] with `rows`.
        rows: [nnz] neuron of each connection, ascending, where neurons have different numbers of connections.
        hot: [H] hot columns, where `x` is the whole input.
        common, rare, rare_rows: see `SelectedPlaces`.

    Returns:
        Shaped as `slot`; float32 for half-precision inputs (accumulated in float32), else the inputs' dtype.
    """
    n, neurons = dy.shape
    column = slot if hot is None else hot[slot]
    dense = cost.product(n, neurons, x.shape[1])
    if dy.device.type != "cpu":  # where products are cheap and every call costs a launch
        return by_product(dy, x, column, rows)
    copied = 0.0 if hot is None else cost.columns(n, common)
    mixed = copied + cost.product(n, neurons, common) + cost.rare(n, neurons, rare.numel())
    gathered = cost.gather(n, slot.numel(), ragged=rows is not None)
    if gathered <= min(mixed, dense):
        return by_gather(dy, x, column, rows)
    if dense < mixed:
        return by_product(dy, x, column, rows)
    first = x[:, :common] if hot is None else columns(x, hot[:common])
    gradient = by_product(dy, first, slot.clamp(max=max(common - 1, 0)), rows)
    if not rare.numel():
        return gradient
    others = gathered_sum(dy, x, column.flatten()[rare], gradient.dtype, rare_rows)
    return gradient.flatten().index_copy(0, rare, others).view_as(gradient)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which products of these tensors are added: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def by_product(dy: Tensor, x: Tensor, slot: Tensor, rows: Tensor | None) -> Tensor:
    """As `selected_gradient`: dense products over a block of neurons, gathered at once."""
    neurons, width = dy.shape[1], x.shape[1]
    if not width:
        return dy.new_zeros(slot.shape, dtype=accumulator(dy, x))
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
        return matmul.transposed_product(x, dy)
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
        sums = [gathered_sum(dy, x, slot[:, k], dtype) for k in range(slot.shape[1])]
        return torch.stack(sums, 1)
    step = max(1, 4 * BLOCK // max(1, min(x.shape[0], 2048)))
    sums = [
        gathered_sum(dy, x, slot[first : first + step], dtype, rows[first : first + step])
        for first in range(0, slot.numel(), step)
    ]
    return torch.cat(sums)


def gathered_sum(dy: Tensor, x: Tensor, slot: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """sum_n dY[n, o] X[n, slot[o]], or sum_n dY[n, rows[i]] X[n, slot[i]]: [len(slot)]."""
    total = dy.new_zeros(slot.shape, dtype=dtype)
    step = max(256, 2 * BLOCK // slot.numel())
    for first in range(0, x.shape[0], step):
        block = dy[first : first + step]
        if rows is not None:
            block = columns(block, rows)
        total += columns(x[first : first + step], slot).to(dtype).mul_(block).sum(0)
    return total


def columns(x: Tensor, chosen: Tensor) -> Tensor:
    """x[:, chosen] as an own tensor; `gather` reads `x` row by row, indexing column by column, which is slower."""
    return x.gather(1, chosen.expand(x.shape[0], -1))
