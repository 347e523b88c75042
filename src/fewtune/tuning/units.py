r"""Values in units of their input: what a step of an optimiser does to a neuron's output is then alike everywhere.

.. math:: w = w_0 + u / \mathrm{rms}(x_j)

Trained is u, the change of a connection times the root mean square of its input column, in place of w. A step of Adam
moves every u by about the learning rate, and so a neuron's output by about the learning rate, whether its column is hot
or not; with w itself it moves the output by the learning rate times rms(x_j).

The gradient of u is that of w over rms(x_j), by the chain rule, so this holds for every optimiser. A learning rate of
1/rms a value would be the same for Adam alone, and only where its epsilon is small; SGD would need 1/rms^2, and decay
would pull towards 0, where that of u pulls towards the pretrained weight. At inference there is nothing of it: the
weights are written, and a delta is taken of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import TuningError
from fewtune.importance.columns import ColumnSums
from fewtune.importance.passes import left_as_found, reduce_over_processes
from fewtune.neurons import View
from fewtune.quantised import seen_dequantised
from fewtune.tuning.ops import SelectedPlaces

FLOOR = 0.01
"""Of the root mean square of all of a layer's inputs: the least of a column, so that one that is nearly never on does
not make its values large."""


@dataclass(frozen=True)
class Units:
    """Where the values of a weight begin, and the weight's change by one unit of each; both in the values' shape."""

    start: Tensor
    scale: Tensor

    @classmethod
    def of(cls, start: Tensor, column_rms: Tensor, places: SelectedPlaces) -> Units:
        """From the rms of a layer's input columns, [groups, fan_in]."""
        least = FLOOR * column_rms.square().mean().sqrt()
        rms = column_rms.clamp(min=least) if least > 0 else torch.ones_like(column_rms)
        neurons = torch.arange(places.neurons)[:, None] if places.rows is None else places.rows.cpu()
        group = neurons * len(rms) // places.neurons
        return cls(start, (1 / rms.cpu()[group, places.columns.cpu()]).to(start))

    def weights(self, u: Tensor) -> Tensor:
        """w = w0 + u / rms."""
        return self.start + u * self.scale

    def values(self, weights: Tensor) -> Tensor:
        """The inverse, to the last bit but one."""
        return (weights.to(self.start.dtype) - self.start) / self.scale

    def rows(self, rows: slice) -> Units:
        """Of some neurons alone."""
        return Units(self.start[rows], self.scale[rows])

    def to(self, device: torch.device) -> Units:
        """The same on a device."""
        return Units(self.start.to(device), self.scale.to(device))


@seen_dequantised
def column_rms(
    model: nn.Module, batches: Iterable[Any], views: Mapping[str, View], *, limit: int | None = None
) -> dict[str, Tensor]:
    """The root mean square of what each input column of a layer is given, [groups, fan_in], by its weight's name.

    The model is run in evaluation mode and left as found; of several processes each sees its batches, and all give the
    same. A column of a convolution is one tap of one channel; padding counts as zeros.

    Args:
        model: plain, on its device.
        batches: (images, labels); labels are not looked at.
        views: of the weights that are asked for; of a selection ``{n: selection.anatomy.views[n] for n in
            selection.places}``.
        limit: use this many batches at most.

    Raises:
        TuningError: a weight is never given to a linear or convolution function: reparametrised, recurrent, or inside
            an attention module of torch.
    """
    held = dict(model.named_parameters())
    columns = ColumnSums({name: held[name] for name in views}, views, gradients=False)
    device = next(model.parameters()).device
    with left_as_found(model, train_mode=False), torch.no_grad(), columns:
        for images, _ in islice(batches, limit):
            model(images.to(device))
    if unseen := columns.unseen():
        raise TuningError(
            f"units=input: {unseen[0]} is given to no linear or convolution function, and what its columns are given "
            "is not known; take units=weight, or exclude it"
        )
    columns.reduced(reduce_over_processes)
    return {name: columns.mean_squares(name).sqrt().cpu() for name in views}
