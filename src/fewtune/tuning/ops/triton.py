"""The selected weight gradient as a Triton kernel."""

from __future__ import annotations

from torch import Tensor


def usable(dy: Tensor, x: Tensor, slot: Tensor) -> bool:
    """Whether the kernel can compute this."""
    return False


def selected_gradient(dy: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    raise NotImplementedError
