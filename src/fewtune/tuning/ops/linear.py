"""The selected weight gradient of a linear layer: dV[o, k] = sum_n dY[n, o] X[n, index[o, k]]."""

from __future__ import annotations

from torch import Tensor

from fewtune.tuning.ops.cost import KEEP_SHARE
from fewtune.tuning.ops.operators import selected_gradient
from fewtune.tuning.ops.places import SelectedPlaces
from fewtune.tuning.ops.torch_linear import columns


def linear_keep(x: Tensor, places: SelectedPlaces, *, keep_whole: bool = False) -> Tensor:
    """What the forward pass saves of its input for `linear_selected_gradient`.

    Args:
        x: the layer's input, [..., fan_in].
        places: the selected connections.
        keep_whole: something else keeps `x` anyway, so a copy of columns would be kept beside it.

    Returns:
        The hot columns as an own tensor [N, H] (N: the product of the leading dimensions) where
        H <= KEEP_SHARE * fan_in and not `keep_whole`; else `x` itself.
    """
    if keep_whole or places.hot.numel() > KEEP_SHARE * places.fan_in:
        return x
    return columns(x.reshape(-1, places.fan_in), places.hot)


def linear_selected_gradient(grad_output: Tensor, kept: Tensor, places: SelectedPlaces) -> Tensor:
    """The gradient of a linear layer's selected connections.

    Args:
        grad_output: dL/dy, [..., neurons].
        kept: what `linear_keep` returned.
        places: the selected connections.

    Returns:
        [neurons, K], or [nnz] where rows differ; float32 for half-precision inputs, else the inputs' dtype.
    """
    dy = grad_output.reshape(-1, places.neurons)
    x = kept.reshape(-1, kept.shape[-1])
    hot = places.hot if x.shape[1] == places.fan_in else None
    return selected_gradient(dy, x, places, hot)
