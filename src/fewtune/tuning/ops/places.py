"""Where a layer's selected connections lie, in the forms that the gradient functions read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SelectedPlaces:
    """The selected connections of one weight seen as a matrix [neurons, fan_in].

    Made by `SelectedPlaces.of`. A plain value: neither a module nor a buffer, so that nothing broadcasts,
    averages or saves it. Values belong to connections in the order of `index` (row by row) or of `rows`.

    Attributes:
        neurons, fan_in: shape of the weight's matrix.
        groups: groups of a convolution; columns are counted within a group's fan_in.
        taps: kernel positions of a convolution (1 for a linear layer): column = channel * taps + tap.
        index: [neurons, K] selected columns, where every neuron has the same number K of them; else None.
        rows, columns: [nnz] row and column of each connection where `index` is None; else None.
        hot: [H] distinct selected columns, ascending.
        slot: position in `hot` of each selected column, shaped as `index` or as `columns`.
        hot_channels: [C] distinct input channels (counted over all groups) that are read, ascending.
        channel_slot: position in `hot_channels` of each connection's input channel, shaped as `slot`.
    """

    neurons: int
    fan_in: int
    groups: int
    taps: int
    index: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    hot: Tensor
    slot: Tensor
    hot_channels: Tensor
    channel_slot: Tensor

    @classmethod
    def of(
        cls, shape: tuple[int, int], flat: Tensor, *, groups: int = 1, taps: int = 1, device: object = None
    ) -> SelectedPlaces:
        """From a matrix shape [neurons, fan_in] and sorted flat indices (row * fan_in + column).

        Args:
            shape: (neurons, fan_in) of the weight's matrix.
            flat: 1-D int64, ascending and distinct, at least one.
            groups, taps: of a convolution: its groups and the number of its kernel positions.
            device: where the index tensors shall lie (default: where `flat` lies).
        """
        neurons, fan_in = shape
        assert flat.ndim == 1 and flat.numel() > 0, "a layer without connections has no places"
        assert fan_in % taps == 0 and neurons % groups == 0, (shape, groups, taps)
        flat = flat.detach().to("cpu", torch.int64)
        rows = torch.div(flat, fan_in, rounding_mode="floor")
        columns = flat - rows * fan_in
        counts = torch.bincount(rows, minlength=neurons)
        uniform = bool((counts == counts[0]).all())
        form = (neurons, -1) if uniform else (-1,)

        group = torch.div(rows, neurons // groups, rounding_mode="floor")
        channels = group * (fan_in // taps) + torch.div(columns, taps, rounding_mode="floor")
        hot, slot = torch.unique(columns, return_inverse=True)
        hot_channels, channel_slot = torch.unique(channels, return_inverse=True)
        places = cls(
            neurons=neurons,
            fan_in=fan_in,
            groups=groups,
            taps=taps,
            index=columns.view(form) if uniform else None,
            rows=None if uniform else rows,
            columns=None if uniform else columns,
            hot=hot,
            slot=slot.view(form),
            hot_channels=hot_channels,
            channel_slot=channel_slot.view(form),
        )
        return places if device is None else places.to(device)

    @property
    def k(self) -> int | None:
        """Connections per neuron where it is the same number everywhere, else None."""
        return None if self.index is None else self.index.shape[1]

    @property
    def nnz(self) -> int:
        """Number of selected connections."""
        return self.slot.numel()

    @property
    def device(self) -> torch.device:
        return self.slot.device

    def to(self, device: object) -> SelectedPlaces:
        """The same places with every index tensor on `device`; itself where they lie there already."""
        target = torch.device(device)  # type: ignore[arg-type]
        if target == self.device:
            return self
        moved = {
            field.name: value.to(target)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
