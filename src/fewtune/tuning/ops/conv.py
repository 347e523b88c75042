"""The selected weight gradient of a convolution in one, two or three dimensions: what is kept, and what follows.

A convolution is a linear layer over its unfolded input: position p of image n gives the row X[(n, p), column], and
column = channel * taps + tap. Only the hot columns of that matrix are ever formed, from a padded input, of which each
column is a strided view at an offset of its own (`patches.py`). The gradient is a custom operator too, as that of a
linear layer is (`linear.py`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewtune.tuning.ops import patches, torch_conv
from fewtune.tuning.ops.cost import KEEP_SHARE
from fewtune.tuning.ops.linear import hot_columns_gradient, linear_selected_gradient
from fewtune.tuning.ops.places import SelectedPlaces
from fewtune.tuning.ops.torch_linear import accumulator


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

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer of every position's channels."""
        return max(*self.kernel_size, *self.stride, self.groups) == 1 and max(self.padding) == 0

    def positions(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The output's spatial size for an input's."""
        return tuple(
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(
                size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


Form = Literal["whole", "channels", "columns"]


def conv_keep(
    x: Tensor, places: SelectedPlaces, shape: ConvShape, *, keep_whole: bool = False, form: Form | None = None
) -> Tensor:
    """What the forward pass saves of its input for `conv_selected_gradient`.

    Args:
        x: the layer's input, [N, channels, *size] (or without N), any memory format.
        places: the selected connections, made with the convolution's groups and taps.
        shape: the convolution.
        keep_whole: something else keeps `x` anyway, so a copy would be kept beside it.
        form: what `conv_form` says of this input, where that is known.

    Returns:
        The smallest of: `x` itself; its hot channels [N, C, *size]; the hot columns of the unfolded input
        [N, H, *positions]. The last two are copies, kept where they are at most KEEP_SHARE of `x`, and not
        where `keep_whole`. All keep the memory format of `x`.
    """
    if x.ndim == len(shape.kernel_size) + 1:
        return conv_keep(x.unsqueeze(0), places, shape, keep_whole=keep_whole)
    form = "whole" if keep_whole else form or conv_form(places, shape, x.shape)
    if form == "whole":
        return x
    if form == "channels":
        return patches.select(x, places.hot_channels)
    unfolded = patches.Unfolded.of(x, *shape[:4])
    return unfolded.columns(unfolded.offsets(places.hot // places.taps, places.hot_tap))


def conv_form(places: SelectedPlaces, shape: ConvShape, input_shape: torch.Size) -> Form:
    """Which of the three forms of `conv_keep` is the smallest for an input [N, channels, *size], by shapes alone."""
    channels, positions = input_shape[1], math.prod(input_shape[2:])
    whole = KEEP_SHARE * channels * positions
    columns = places.hot.numel() * math.prod(shape.positions(tuple(input_shape[2:])))
    hot_channels = places.hot_channels.numel() * positions
    if columns <= min(whole, hot_channels):
        return "columns"
    # A group's channels are not its own after some have been left out, which the library cannot compute with.
    return "channels" if hot_channels <= whole and shape.groups == 1 else "whole"


def conv_selected_gradient(
    grad_output: Tensor,
    kept: Tensor,
    places: SelectedPlaces,
    shape: ConvShape,
    input_shape: torch.Size,
    form: Form | None = None,
) -> Tensor:
    """The gradient of a convolution's selected connections.

    Args:
        grad_output: dL/dy, [N, neurons, *positions] (or without N), any memory format.
        kept: what `conv_keep` returned.
        places, shape: as given to `conv_keep`.
        input_shape: shape of the layer's input.
        form: of what was kept; left out, it is told by its shape.

    Returns:
        [neurons, K], or [nnz] where rows differ; float32 for half-precision inputs, else the inputs' dtype.
    """
    if len(input_shape) == len(shape.kernel_size) + 1:
        grad_output, input_shape = grad_output.unsqueeze(0), torch.Size((1, *input_shape))
        kept = kept.unsqueeze(0) if kept.ndim < grad_output.ndim else kept
    if form is None:
        form = "whole" if kept.shape == input_shape else conv_form(places, shape, input_shape)
    if patches.channels_last(kept) and (form == "columns" or shape.pointwise):
        # Columns that lie last in memory are those of a linear layer whose rows are (image, position).
        dy, x = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (grad_output, kept))
        if form == "columns":
            return hot_columns_gradient(dy, x, places)
        return linear_selected_gradient(dy, x, places, keep_whole=form == "whole")
    channel: Tensor | None
    tap: Tensor | None
    match form:
        case "columns":
            channel, tap = None, None
        case "channels":
            channel, tap = places.hot_channel, places.hot_tap
        case _:
            channel, tap = places.hot // places.taps, places.hot_tap
    function = _operator if torch.compiler.is_compiling() else torch_conv.selected_gradient
    return function(grad_output, kept, places.hot_index, places.rows, channel, tap, *shape)


_operator = torch.library.custom_op(
    "fewtune::conv_selected_gradient", torch_conv.selected_gradient, mutates_args=()
)  # fmt: skip


@_operator.register_fake
def _(dy: Tensor, kept: Tensor, hot_index: Tensor, *others: object) -> Tensor:
    return dy.new_empty(hot_index.shape, dtype=accumulator(dy, kept))
