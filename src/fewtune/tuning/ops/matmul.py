"""Matrix products of a training step on a CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 matrices with its BLAS (MKL on x86), which leaves half of some processors' vector units idle:
on AMD's with AVX-512, oneDNN is twice as fast. Which one is faster here is measured once, at the first large product.
The two round differently in the last bits. A plain model keeps torch's own products, and so do evaluation and
prediction with a tuned one, so that a task predicts the same numbers attached, applied and detached. What is compiled
keeps them too.

`torch.backends.mkldnn.flags(enabled=False)`, or `only_blas`, keeps to the BLAS.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications below which a product is over before oneDNN has set itself up.
WORTH = 2**22
# Columns of a product below which oneDNN has too little to divide among threads, however long the sum.
DIVISIBLE = 256
# How much faster oneDNN must have been: far from what two runs on one machine differ by, so that all runs choose alike.
CLEARLY = 1.3

_blas_only = False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b of x [..., fan_in], W [neurons, fan_in], b [neurons]; not differentiable."""
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows, bias = x.reshape(-1, x.shape[-1]), None if bias is None else bias.contiguous()  # its stride is not looked at
    return _onednn()(rows, _dense(weight), bias, "none", [], "").view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B of A [N, M] and B [M, O]; not differentiable."""
    return linear(a, b.t())


def transposed_product(x: Tensor, dy: Tensor) -> Tensor:
    """X^T dY [W, O] of X [N, W] and dY [N, O], a sum over the batch; not differentiable."""
    return product(x.t(), dy) if dy.shape[1] >= DIVISIBLE else x.t() @ dy


@contextlib.contextmanager
def only_blas() -> Iterator[None]:
    """Within, all products are torch's own: for measuring what is gained beside the library."""
    global _blas_only
    before, _blas_only = _blas_only, True
    try:
        yield
    finally:
        _blas_only = before


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or _blas_only or x.device.type != "cpu":
        return False
    if not all(t.dtype is torch.float32 for t in (x, weight, bias) if t is not None):
        return False
    large = x.numel() * weight.shape[0] >= WORTH
    return large and bool(torch.backends.mkldnn.enabled) and onednn_is_faster()


def _dense(weight: Tensor) -> Tensor:
    """The same matrix without gaps between its rows, or columns: with gaps oneDNN is a thousand times slower."""
    if weight.stride(0) == 1:
        return weight.t().contiguous().t()
    return weight.contiguous()


def _onednn() -> Callable[..., Tensor]:
    return torch.ops.mkldnn._linear_pointwise.default  # what torch's own compiler calls


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices clearly faster than torch's BLAS here; measured in milliseconds."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    by_blas, by_onednn = lambda: F.linear(x, weight), lambda: _onednn()(x, weight, None, "none", [], "")
    times = [(_seconds(by_blas), _seconds(by_onednn)) for _ in range(6)][1:]
    blas, onednn = (min(each) for each in zip(*times, strict=True))
    return blas > CLEARLY * onednn


def _seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
