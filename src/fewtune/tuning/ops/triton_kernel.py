# mypy: disable-error-code="no-untyped-def"
"""The kernel of `triton.py`; importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def selected_gradient_kernel(
    dy_ptr,
    x_ptr,
    column_ptr,
    partial_ptr,
    n,
    neurons,
    width,
    k,
    rows_each,
    dy_stride_n,
    dy_stride_o,
    x_stride_n,
    x_stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """partial[part, o, k] = sum over this part's rows n of dY[n, o] X[n, column[o, k]].

    A program forms the product of BLOCK_W columns of X with BLOCK_O neurons of dY in registers, over one part of the
    rows, and stores the selected entries of it alone. Each (o, k) has its column in one block of columns, so that each
    entry of `partial` is stored once, by one program, in a fixed order of additions: no atomics.
    """
    block_o, block_w, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    w = block_w * BLOCK_W + tl.arange(0, BLOCK_W)
    first = part * rows_each
    last = tl.minimum(first + rows_each, n)

    product = tl.zeros((BLOCK_W, BLOCK_O), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        row_64 = row.to(tl.int64)
        dy = tl.load(
            dy_ptr + row_64[:, None] * dy_stride_n + o[None, :] * dy_stride_o,
            mask=(row[:, None] < last) & (o[None, :] < neurons),
            other=0.0,
        )
        x = tl.load(
            x_ptr + row_64[None, :] * x_stride_n + w[:, None] * x_stride_w,
            mask=(row[None, :] < last) & (w[:, None] < width),
            other=0.0,
        )
        if UPCAST:
            x, dy = x.to(tl.float32), dy.to(tl.float32)
        product = tl.dot(x, dy, product, input_precision=PRECISION)

    for i in range(0, k):
        place = o.to(tl.int64) * k + i
        column = tl.load(column_ptr + place, mask=o < neurons, other=-1)
        chosen = tl.sum(tl.where(w[:, None] == column[None, :], product, 0.0), axis=0)
        inside = (column >= block_w * BLOCK_W) & (column < (block_w + 1) * BLOCK_W)
        tl.store(partial_ptr + part.to(tl.int64) * neurons * k + place, chosen, mask=inside & (o < neurons))
