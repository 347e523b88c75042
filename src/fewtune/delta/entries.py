"""Reading and writing some entries of a tensor, whatever its strides and device."""

from __future__ import annotations

import torch
from torch import Tensor


def read(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The entries at flat positions (counted row by row in the tensor's shape) as a new 1-D tensor; None: all."""
    tensor = tensor.detach()
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
    if index is None:
        tensor.copy_(values.view(tensor.shape))
        return
    index = index.to(tensor.device)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, index, values)
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = values
