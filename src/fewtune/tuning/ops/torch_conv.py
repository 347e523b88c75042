"""The selected weight gradient of a convolution in plain torch, the cheapest by `cost.py` of four ways:

product   the hot columns of the unfolded input, one product with dY, then a gather (dense convolutions)
gather    for each connection, its column times its neuron's dY, added over images and positions
pick      the same, but the columns are picked by the convolution itself, with weights of one 1 a neuron (grouped ones)
library   the library's own weight gradient over the channels that were kept, then a gather
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewtune.tuning.ops import cost
from fewtune.tuning.ops.patches import Unfolded, channels_last, laid_out, select
from fewtune.tuning.ops.torch_linear import accumulator

# Elements of one block of columns: see `torch_linear.BLOCK`; on other devices a block is many launches' worth of work.
BLOCK = 2**21
BLOCK_OFF_CPU = 2**26


def selected_gradient(
    dy: Tensor,
    kept: Tensor,
    hot_index: Tensor,
    rows: Tensor | None,
    channel: Tensor | None,
    tap: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dV of dY [N, O, *positions] and what was kept of the input.

    Args:
        dy: [N, O, *positions], any memory format.
        kept: the input or some of its channels [N, C, *size], or its hot columns [N, H, *positions].
        hot_index: [O, K] position among the hot columns of each connection's column, or [nnz] with `rows`.
        rows: [nnz] neuron of each connection where neurons have different numbers of connections.
        channel, tap: [H] of each hot column: its position among the kept channels, and its kernel position;
            None where `kept` holds the hot columns themselves.
        kernel_size, stride, padding, dilation, groups: of the convolution.

    Returns:
        Shaped as `hot_index`; float32 for half-precision inputs (accumulated in float32), else the inputs' dtype.
    """
    if dy.numel() == 0:
        return dy.new_zeros(hot_index.shape, dtype=accumulator(dy, kept))
    last = channels_last(kept)
    n, neurons = dy.shape[0] * math.prod(dy.shape[2:]), dy.shape[1]
    hot = kept.shape[1] if channel is None else channel.numel()
    copied = 0.0 if channel is None else cost.columns(n, hot)
    costs = {_by_product: copied + cost.product(n, neurons, hot) if groups == 1 else math.inf}
    if dy.device.type == "cpu":
        costs[_by_gather] = cost.conv_gather(n, hot_index.numel(), ragged=rows is not None, channels_last=last)
    elif groups > 1 and channel is None:
        costs[_by_gather] = 0.0
    if channel is not None and tap is not None:
        fan_in = kept.shape[1] // groups * math.prod(kernel_size)
        library = cost.library(n, neurons, fan_in, groups, channels_last=last)
        pick = cost.pick(n, hot_index.numel()) if _can_pick(dy, kept, rows, groups, last) else math.inf
        if min(library, pick) <= min(costs.values()):
            column = channel % (kept.shape[1] // groups) * math.prod(kernel_size) + tap
            numbers = (kernel_size, stride, padding, dilation, groups)
            if pick < library:
                return _by_picking(dy, kept, column[hot_index], *numbers)
            return _by_library(dy, kept, column[hot_index], rows, *numbers)
        unfolded = Unfolded.of(kept, kernel_size, stride, padding, dilation)
        view, offsets = unfolded.view, unfolded.offsets(channel, tap)
    else:
        view, offsets = laid_out(kept, last), None
    cheapest = min(costs, key=costs.__getitem__)
    return cheapest(laid_out(dy, last), view, offsets, hot_index, rows, last)


def _can_pick(dy: Tensor, x: Tensor, rows: Tensor | None, groups: int, last: bool) -> bool:
    """Whether oneDNN has a convolution for `_by_picking`; what it was measured for is a grouped one, channels last."""
    grouped = groups > 1 and rows is None and last
    return grouped and dy.device.type == "cpu" and dy.dtype is x.dtype is torch.float32 and _onednn()


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def _by_picking(
    dy: Tensor,
    x: Tensor,
    column: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dV = sum U[:, column] dY for one connection of every neuron at a time, over blocks of images.

    A convolution whose every neuron has one weight of 1, at its connection, and zeros beside it gives the column of
    each neuron: exactly, without an unfolded or a padded copy, and faster than `gather` reads pixel by pixel.
    """
    dy = laid_out(dy, True)
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    step = _images_at_once(dy, dy.shape[1] * math.prod(dy.shape[2:]))
    total = dy.new_zeros(column.shape)
    for number, places in enumerate(column.unbind(1)):
        one = x.new_zeros(dy.shape[1], math.prod(shape[1:])).scatter_(1, places[:, None], 1.0).view(shape)
        for first in range(0, dy.shape[0], step):
            images = x[first : first + step]
            u = torch.convolution(images, one, None, stride, padding, dilation, False, [0] * len(stride), groups)
            total[:, number] += u.mul_(dy[first : first + step]).sum((0, *range(2, dy.ndim)))
    return total


def _by_library(
    dy: Tensor,
    x: Tensor,
    column: Tensor,
    rows: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The dense gradient of the kept channels, then a gather."""
    dtype = accumulator(dy, x)
    if dy.device.type == "cpu":
        dy, x = dy.to(dtype), x.to(dtype)
    gradient = _weight_gradient(dy, x, kernel_size, stride, padding, dilation, groups)
    return (gradient.gather(1, column) if rows is None else gradient[rows, column]).to(dtype)


def _weight_gradient(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The library's whole weight gradient, [O, fan_in]."""
    weight = x.new_empty(1).expand(dy.shape[1], x.shape[1] // groups, *kernel_size)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False]
    )
    return gradient.reshape(dy.shape[1], -1)


def _images_at_once(dy: Tensor, elements: int) -> int:
    """How many images make a block, if each takes so many elements."""
    block = BLOCK if dy.device.type == "cpu" else BLOCK_OFF_CPU
    return max(1, block // max(1, elements))


def _by_product(
    dy: Tensor, view: Tensor, offsets: Tensor | None, hot_index: Tensor, rows: Tensor | None, last: bool
) -> Tensor:
    """dV = (U^T dY)[hot_index, o] of the hot columns U, added up over blocks of images."""
    dtype = accumulator(dy, view)
    hot = view.shape[1] if offsets is None else offsets.numel()
    neurons, positions = dy.shape[1], math.prod(dy.shape[2:])
    pointwise = not last and _pointwise_is_faster(dy, dtype, hot)
    step = _images_at_once(dy, max(hot, neurons) * positions + hot * neurons)
    if pointwise and offsets is None:
        step = dy.shape[0]  # nothing is copied
    total = dy.new_zeros(hot, neurons, dtype=dtype)
    for first in range(0, dy.shape[0], step):
        part = view[first : first + step]
        u = (part if offsets is None else select(part, offsets, last)).to(dtype)
        d = dy[first : first + step].to(dtype)
        if pointwise:
            total += _pointwise_gradient(d, u).t()
            continue
        u, d = u.flatten(2), d.flatten(2)
        if last:
            u, d = u.movedim(1, -1).reshape(1, -1, hot).mT, d.movedim(1, -1).reshape(1, -1, neurons).mT
        if u.shape[0] == 1:
            total.addmm_(u[0], d[0].t())
        else:
            total += torch.bmm(u, d.mT).sum(0)
    return total.gather(0, hot_index.t()).t().contiguous() if rows is None else total[hot_index, rows]


def _pointwise_is_faster(dy: Tensor, dtype: torch.dtype, hot: int) -> bool:
    """Whether the columns' product is worth the set-up of oneDNN, which computes it as a convolution's gradient."""
    enough = hot >= cost.POINTWISE_COLUMNS and hot * dy.shape[1] >= cost.POINTWISE_WEIGHTS
    return enough and dy.device.type == "cpu" and dtype is torch.float32 and bool(torch.backends.mkldnn.enabled)


def _pointwise_gradient(dy: Tensor, u: Tensor) -> Tensor:
    """dY U^T [O, H], summed over images and positions: the weight gradient of a 1 x 1 convolution of U."""
    ones, zeros = [1] * (u.ndim - 2), [0] * (u.ndim - 2)
    return _weight_gradient(dy, u, ones, ones, zeros, ones, 1)


def _by_gather(
    dy: Tensor, view: Tensor, offsets: Tensor | None, hot_index: Tensor, rows: Tensor | None, last: bool
) -> Tensor:
    """dV = sum U[:, hot_index] dY for one connection of every neuron at a time, over blocks of images."""
    columns = hot_index if offsets is None else offsets[hot_index]
    if rows is None:
        return torch.stack([_gathered_sum(dy, view, column, None, last) for column in columns.unbind(1)], 1)
    step = max(1, _images_at_once(dy, math.prod(dy.shape[2:])))
    pieces = zip(columns.split(step), rows.split(step), strict=True)
    return torch.cat([_gathered_sum(dy, view, column, row, last) for column, row in pieces])


def _gathered_sum(dy: Tensor, view: Tensor, columns: Tensor, rows: Tensor | None, last: bool) -> Tensor:
    """sum over images and positions of view[:, columns] dY, or of view[:, columns] dY[:, rows]."""
    dtype = accumulator(dy, view)
    total = dy.new_zeros(columns.shape, dtype=dtype)
    step = _images_at_once(dy, columns.numel() * math.prod(dy.shape[2:]))
    for first in range(0, dy.shape[0], step):
        d = dy[first : first + step]
        d = d if rows is None else select(d, rows, last)
        u = select(view[first : first + step], columns, last).to(dtype)  # an own tensor, which may hold the product
        total += (u.mul_(d) if d.dtype is dtype else u * d).sum((0, *range(2, dy.ndim)))
    return total
