"""The selected weight gradient of two matrices as a Triton kernel: dV[o, k] = sum_n dY[n, o] X[n, column[o, k]].

Deterministic: the rows are split into a number of parts that depends on shapes and the device alone, each part is
summed by one program, and the parts are added in order. Nothing is tuned by timing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os

import torch
from torch import Tensor

# Above this many columns a library product is as fast: the work is then in the multiplications, not in the bytes.
# Exact float32 has no tensor cores, so it is so earlier.
MOST_COLUMNS = 256
MOST_COLUMNS_EXACT = 64
BLOCK_N, BLOCK_O = 64, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(dy: Tensor, x: Tensor) -> bool:
    """Whether the kernel is the way: a GPU (or Triton's interpreter), equal dtypes, few enough columns."""
    if not (dy.is_cuda or _interpreted()) or not _installed():
        return False
    most = MOST_COLUMNS if dy.dtype != torch.float32 or _tf32(dy) else MOST_COLUMNS_EXACT
    return dy.dtype == x.dtype and dy.dtype in DTYPES and x.shape[1] <= most and dy.numel() > 0


def _tf32(dy: Tensor) -> bool:
    return dy.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def selected_gradient(dy: Tensor, x: Tensor, column: Tensor) -> Tensor:
    """dV [O, K] of dY [N, O] and X [N, W], accumulated in float32.

    Args:
        dy: [N, O], any strides.
        x: [N, W] of the same dtype, any strides.
        column: [O, K] column of `x` for each connection.

    float32 inputs are multiplied in TF32 where `torch.backends.cuda.matmul` allows it, else exactly.
    """
    from fewtune.tuning.ops.triton_kernel import selected_gradient_kernel

    (n, neurons), width, k = dy.shape, x.shape[1], column.shape[1]
    block_w = min(128, max(16, 1 << (width - 1).bit_length()))
    blocks_o, blocks_w = math.ceil(neurons / BLOCK_O), math.ceil(width / block_w)
    rows_each = _rows_each(n, blocks_o * blocks_w, dy.device)
    parts = math.ceil(n / rows_each)
    partial = torch.empty(parts, neurons, k, dtype=torch.float32, device=dy.device)
    with torch.cuda.device(dy.device) if dy.is_cuda else contextlib.nullcontext():
        selected_gradient_kernel[(blocks_o, blocks_w, parts)](
            dy,
            x,
            column.contiguous(),
            partial,
            n,
            neurons,
            width,
            k,
            rows_each,
            *dy.stride(),
            *x.stride(),
            BLOCK_N=BLOCK_N,
            BLOCK_O=BLOCK_O,
            BLOCK_W=block_w,
            PRECISION="tf32" if _tf32(dy) else "ieee",
            UPCAST=_interpreted(),  # the interpreter multiplies bfloat16 bit patterns as integers
        )
    return partial[0] if parts == 1 else partial.sum(0)


def _rows_each(n: int, programs: int, device: torch.device) -> int:
    """Rows of one part: as many parts as give every multiprocessor two programs, of four blocks of rows at least."""
    wanted = math.ceil(2 * _multiprocessors(device) / programs)
    blocks = math.ceil(n / BLOCK_N)
    return BLOCK_N * max(min(4, blocks), math.ceil(blocks / wanted))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
