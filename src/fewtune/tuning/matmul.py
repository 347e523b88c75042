"""Which library multiplies float32 matrices on a CPU: one switch for everything that torch computes.

torch multiplies float32 matrices with its BLAS (MKL on x86), which leaves half of some processors' vector units idle:
on AMD's with AVX-512, oneDNN, which torch brings too, is up to twice as fast. The two round differently in the last
bits. Within `matrix_library("onednn")` the products behind `nn.Linear`, ``@`` and their backward passes are oneDNN's,
whatever model or method asks for them: torch's CPU kernels of ``mm`` and ``addmm`` are replaced in its dispatcher.
(Convolutions are oneDNN's anyway; batched products, fused attention and compiled code keep what torch gives them.)
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fewtune.errors import TuningError

MatrixLibrary = Literal["torch", "onednn"]

# Multiplications below which a product is over before oneDNN has set itself up.
WORTH = 2**22
# Rows or columns of a product below which oneDNN has too little to divide among threads, however long the sums.
DIVISIBLE = 256

_lock = threading.RLock()
_kernels: torch.library.Library | None = None


@contextlib.contextmanager
def matrix_library(name: MatrixLibrary) -> Iterator[None]:
    """Within, float32 matrices are multiplied on the CPU by this library, in all threads of the process.

    Args:
        name: "torch", its own choice, as outside of any such context; or "onednn". Contexts may be nested.

    Raises:
        TuningError: there is no such library, or this torch is built without oneDNN.

    Example: ``with fewtune.matrix_library("onednn"): loss.backward()``, after a forward pass within it or not.
    """
    if name not in get_args(MatrixLibrary):
        raise TuningError(f"matrix_library({name!r}); expected one of {', '.join(get_args(MatrixLibrary))}")
    if name == "onednn" and not onednn_available():
        raise TuningError("this torch is built without oneDNN for matrices; keep matrix_library('torch')")
    before: MatrixLibrary = "onednn" if _kernels is not None else "torch"
    _use(name)
    try:
        yield
    finally:
        _use(before)


def onednn_available() -> bool:
    """Whether this torch can multiply matrices with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _use(name: MatrixLibrary) -> None:
    global _kernels
    with _lock:
        if name == "onednn" and _kernels is None:
            _kernels = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():  # torch 2.9 warns of kernels that are overridden on purpose too
                warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
                _kernels.impl("mm", _mm, "CPU", allow_override=True)
                _kernels.impl("addmm", _addmm, "CPU", allow_override=True)
        elif name == "torch" and _kernels is not None:
            _kernels._destroy()  # torch's own kernels again
            _kernels = None


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """A B of A [N, M] and B [M, O]."""
    if _worth(a, b):
        return _onednn(a, b, None)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # with `out` the kernel is another one: torch's


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * A B; a bias of one number a column is added by oneDNN itself."""
    plain = beta == alpha == 1 and bias.shape == b.shape[1:] and bias.dtype is torch.float32
    if plain and _worth(a, b):
        return _onednn(a, b, bias.contiguous())  # its stride is not looked at
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))


def _worth(a: Tensor, b: Tensor) -> bool:
    if not a.dtype is b.dtype is torch.float32 or a.shape[1] != b.shape[0]:
        return False
    divisible = max(a.shape[0], b.shape[1]) >= DIVISIBLE and a.numel() * b.shape[1] >= WORTH
    return divisible and bool(torch.backends.mkldnn.enabled)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # What torch's own compiler calls for a linear layer, whose weight is B^T.
    return torch.ops.mkldnn._linear_pointwise.default(a, _dense(b.t()), bias, "none", [], "")


def _dense(weight: Tensor) -> Tensor:
    """The same matrix without gaps between its rows, or columns: with gaps oneDNN is a thousand times slower."""
    if weight.stride(0) == 1:
        return weight.t().contiguous().t()
    return weight.contiguous()
