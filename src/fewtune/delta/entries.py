"""Reading and writing some entries of a tensor, whatever its strides, its device and how it is quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from fewtune.quantised import Overlay, dequantised, scheme


def read(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The entries at flat positions (counted row by row in the tensor's shape) as a new 1-D tensor; None: all."""
    tensor = dequantised(tensor).detach()
    if index is None:
        return tensor.reshape(-1).clone()
    index = index.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, index)
    return tensor[torch.unravel_index(index, tensor.shape)]


def write(tensor: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Writes 1-D values to the entries that `read` reads, in place, through the tensor's own strides."""
    tensor = tensor.detach()
    values = values.to(tensor.device, tensor.dtype)
    if index is not None and isinstance(tensor, Overlay):
        tensor.write(index, values)
        return
    if index is None:
        tensor.copy_(values.view(tensor.shape))
        return
    index = index.to(tensor.device)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, index, values)
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values


def writable(tensor: Tensor, index: Tensor) -> Tensor:
    """A copy whose entries at flat positions can be written; of a quantised weight, an overlay on it."""
    return tensor.detach().clone() if scheme(tensor) is None else Overlay.of(tensor, index)
