"""The selected weight gradient of a convolution in one, two or three dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewtune.tuning.ops import reference
from fewtune.tuning.ops.places import SelectedPlaces


class ConvShape(NamedTuple):
    """The numbers of a convolution; zeros as padding. Tuples have one entry a spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvShape:
        """Of a stock layer whose padding is given as numbers."""
        assert not isinstance(layer.padding, str), "padding given as a word has no numbers"
        return cls(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)


def conv_keep(x: Tensor, places: SelectedPlaces, shape: ConvShape, *, keep_whole: bool = False) -> Tensor:
    """What the forward pass saves of its input for `conv_selected_gradient`.

    Args:
        x: the layer's input, [N, channels, *size] (or without N), any memory format.
        places: the selected connections, made with the convolution's groups and taps.
        shape: the convolution.
        keep_whole: something else keeps `x` anyway, so a copy would be kept beside it.

    Returns:
        The hot channels or the hot columns of the unfolded input as an own tensor where that is smaller and not
        `keep_whole`; else `x` itself.
    """
    return x


def conv_selected_gradient(
    grad_output: Tensor, kept: Tensor, places: SelectedPlaces, shape: ConvShape, input_shape: torch.Size
) -> Tensor:
    """The gradient of a convolution's selected connections.

    Args:
        grad_output: dL/dy, [N, neurons, *positions] (or without N), any memory format.
        kept: what `conv_keep` returned.
        places, shape: as given to `conv_keep`.
        input_shape: shape of the layer's input.

    Returns:
        [neurons, K], or [nnz] where rows differ; float32 for half-precision inputs, else the inputs' dtype.
    """
    if len(input_shape) == len(shape.kernel_size) + 1:
        grad_output, kept = grad_output.unsqueeze(0), kept.unsqueeze(0)
    return reference.conv_selected_gradient(grad_output, kept, places, *shape)
