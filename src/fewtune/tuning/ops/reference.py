"""The selected weight gradient the slow, obvious way: the whole dense gradient by autograd, then a gather.

Every fast path of this folder is tested against these two functions, and the benchmarks share them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.tuning.ops.places import SelectedPlaces


def linear_selected_gradient(grad_output: Tensor, x: Tensor, places: SelectedPlaces) -> Tensor:
    """dV[o, k] = (dL/dW)[o, index[o, k]] of y = x W^T.

    Args:
        grad_output: dL/dy, [..., neurons].
        x: the layer's whole input, [..., fan_in].
        places: the selected connections.

    Returns:
        [neurons, K] or [nnz], in float64 for float64 inputs, else in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.enable_grad():
        weight = torch.zeros(places.neurons, places.fan_in, dtype=dtype, device=x.device, requires_grad=True)
        y = F.linear(x.detach().to(dtype), weight)
        (gradient,) = torch.autograd.grad(y, weight, grad_output.to(dtype))
    return places.pick(gradient)


def conv_selected_gradient(
    grad_output: Tensor,
    x: Tensor,
    places: SelectedPlaces,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The same for y = conv(x, W) in one, two or three dimensions, W seen as [neurons, fan_in].

    Args:
        grad_output: dL/dy, [N, neurons, *positions].
        x: the layer's whole input, [N, channels, *size].
        places: the selected connections; a column is channel_in_group * taps + tap.
        kernel_size, stride, padding, dilation, groups: of the convolution, zeros as padding.

    Returns:
        [neurons, K] or [nnz], in float64 for float64 inputs, else in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel_size)]
    with torch.enable_grad():
        shape = (places.neurons, x.shape[1] // groups, *kernel_size)
        weight = torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)
        y = conv(x.detach().to(dtype), weight, None, stride, padding, dilation, groups)
        (gradient,) = torch.autograd.grad(y, weight, grad_output.to(dtype))
    return places.pick(gradient.reshape(places.neurons, places.fan_in))
