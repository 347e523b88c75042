"""A convolution's input seen unfolded, [N, columns, *positions], without ever being unfolded.

In a padded input, the value that column (channel, tap) has at output position p lies at

    offset(channel, tap) + sum_d p_d * stride_d * (memory stride of dimension d)

so that all columns are one strided view with overlaps, read at the hot columns' offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the channels of [N, C, *size] lie last in memory (any number of dimensions)."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def laid_out(x: Tensor, last: bool) -> Tensor:
    """`x` [N, C, *size] with its channels last in memory, or first; itself where they are."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def select(x: Tensor, channels: Tensor, last: bool | None = None) -> Tensor:
    """x[:, channels] as an own tensor in the memory format of `x`, which may overlap itself.

    Each layout has one fast way: indexing copies plane by plane, `gather` reads pixel by pixel.
    """
    if channels_last(x) if last is None else last:
        pixels = x.movedim(1, -1)
        return pixels.gather(-1, channels.expand(*pixels.shape[:-1], -1)).movedim(-1, 1)
    return x[:, channels]


@dataclass(frozen=True)
class Unfolded:
    """The strided view of a padded input: [N, offsets, *positions]."""

    view: Tensor
    last: bool
    channel_stride: int
    tap_strides: tuple[int, ...]
    kernel_size: tuple[int, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Unfolded:
        """Of an input [N, C, *size] in any memory format, with the numbers of the convolution."""
        last = channels_last(x)
        if any(padding):
            x = F.pad(x, [amount for each in reversed(padding) for amount in (each, each)])
        x = laid_out(x, last)
        steps = x.stride()[2:]
        taps = tuple(step * each for step, each in zip(steps, dilation, strict=True))
        reach = tuple((kernel - 1) * each for kernel, each in zip(kernel_size, dilation, strict=True))
        positions = tuple(
            (length - far - 1) // each + 1 for length, far, each in zip(x.shape[2:], reach, stride, strict=True)
        )
        farthest = (x.shape[1] - 1) * x.stride(1)
        farthest += sum((kernel - 1) * tap for kernel, tap in zip(kernel_size, taps, strict=True))
        moves = tuple(step * each for step, each in zip(steps, stride, strict=True))
        view = x.as_strided((x.shape[0], farthest + 1, *positions), (x.stride(0), 1, *moves))
        return cls(view, last, x.stride(1), taps, tuple(kernel_size))

    def offsets(self, channel: Tensor, tap: Tensor) -> Tensor:
        """Offset of each column, given its channel and its tap, both [H]."""
        offset = channel * self.channel_stride
        for size, step in zip(reversed(self.kernel_size), reversed(self.tap_strides), strict=True):
            offset = offset + tap % size * step
            tap = tap // size
        return offset

    def columns(self, offsets: Tensor) -> Tensor:
        """The columns at these offsets as an own tensor [N, H, *positions] in the input's memory format."""
        return select(self.view, offsets, self.last)
