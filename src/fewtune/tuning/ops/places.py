"""Where a layer's selected connections lie, in the forms that the gradient functions read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fewtune.tuning.ops import cost


@dataclass(frozen=True, eq=False)
class SelectedPlaces:
    """The selected connections of one weight seen as a matrix [neurons, fan_in].

    Made by `SelectedPlaces.of`. A plain value: neither a module nor a buffer, so that nothing broadcasts,
    averages or saves it. Values belong to connections in the order of `hot_index`: neuron by neuron, by column.

    A hot column is one that some neuron selected. Real selections use them very unevenly: with K = 1, eight columns of
    a ViT's layer serve nine neurons in ten. The first `common` hot columns are used by enough neurons for a dense
    product over them to pay; the connections to the rest are `rare` and are computed one by one.

    In a grouped convolution each group has columns of its own, so hot columns are counted over all groups:
    (channel over all groups) * taps + tap.

    Attributes:
        neurons, fan_in: shape of the weight's matrix.
        groups: groups of a convolution.
        taps: kernel positions of a convolution (1 for a linear layer); column = channel in group * taps + tap.
        rows: [nnz] neuron of each connection where neurons have different numbers of them; else None.
        hot: [H] distinct hot columns, the most used first.
        hot_index: position in `hot` of each connection's column: [neurons, K], or [nnz] with `rows`.
        common: how many of the hot columns a dense product is worth.
        rare: [R] which connections (positions in the flattened `hot_index`) have another column than those.
        rare_rows: [R] their neurons, ascending.
        rare_column: [R] 1 + their position in `hot`: the column of X' in `fused.py`.
        product_column: 1 + `hot_index`, at most product_width - 1; shaped as `hot_index`.
        product_width: of `fused.py`: the ones and the common columns, filled up to a multiple of `cost.LANES`.
        keeps_columns: whether the hot columns are so few that a linear layer keeps a copy of them, and not its input.
        columns_kept: of `fused.py`: what is gathered for the ones, the hot columns and what fills them up; None where
            that would be nearly all of the input.
        hot_channels: [C] distinct input channels (over all groups) of the hot columns, ascending.
        hot_channel: [H] position in `hot_channels` of each hot column's channel.
        hot_tap: [H] kernel position of each hot column.
    """

    neurons: int
    fan_in: int
    groups: int
    taps: int
    rows: Tensor | None
    hot: Tensor
    hot_index: Tensor
    common: int
    rare: Tensor
    rare_rows: Tensor
    rare_column: Tensor
    product_column: Tensor
    product_width: int
    keeps_columns: bool
    columns_kept: Tensor | None
    hot_channels: Tensor
    hot_channel: Tensor
    hot_tap: Tensor

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        flat: Tensor,
        *,
        groups: int = 1,
        taps: int = 1,
        device: torch.device | str | None = None,
    ) -> SelectedPlaces:
        """From a matrix shape [neurons, fan_in] and sorted flat indices (row * fan_in + column).

        Args:
            shape: (neurons, fan_in) of the weight's matrix.
            flat: 1-D int64, ascending and distinct, at least one.
            groups, taps: of a convolution: its groups and the number of its kernel positions.
            device: where the index tensors shall lie (default: where `flat` lies).
        """
        neurons, fan_in = shape
        assert flat.ndim == 1, "flat indices have one dimension"
        assert flat.numel() > 0, "a layer without connections has no places"
        assert fan_in % taps == 0, (fan_in, taps)
        assert neurons % groups == 0, (neurons, groups)
        target = flat.device if device is None else torch.device(device)
        flat = flat.detach().to("cpu", torch.int64)
        rows = torch.div(flat, fan_in, rounding_mode="floor")
        columns = flat - rows * fan_in
        counts = torch.bincount(rows, minlength=neurons)
        uniform = bool((counts == counts[0]).all())
        form = (neurons, -1) if uniform else (-1,)

        group = torch.div(rows, neurons // groups, rounding_mode="floor")
        hot, hot_index, uses = torch.unique(group * fan_in + columns, return_inverse=True, return_counts=True)
        uses, order = uses.sort(descending=True, stable=True)
        hot, hot_index = hot[order], order.argsort()[hot_index]
        common = cost.worth_a_product(uses, neurons)
        rare = (hot_index >= common).nonzero().squeeze(1)
        width, whole = cost.filled(1 + common), cost.filled(1 + len(hot))
        kept = torch.cat([hot[:1], hot, hot[:1].expand(whole - 1 - len(hot))])
        channels = torch.div(hot, taps, rounding_mode="floor")
        hot_channels, hot_channel = torch.unique(channels, return_inverse=True)
        places = cls(
            neurons=neurons,
            fan_in=fan_in,
            groups=groups,
            taps=taps,
            rows=None if uniform else rows,
            hot=hot,
            hot_index=hot_index.view(form),
            common=common,
            rare=rare,
            rare_rows=rows[rare],
            rare_column=1 + hot_index[rare],
            product_column=(1 + hot_index).clamp(max=width - 1).view(form),
            product_width=width,
            keeps_columns=len(hot) <= cost.KEEP_SHARE * fan_in,
            columns_kept=kept if groups == taps == 1 and whole <= cost.KEEP_SHARE * fan_in else None,
            hot_channels=hot_channels,
            hot_channel=hot_channel,
            hot_tap=hot - channels * taps,
        )
        return places.to(target)

    @property
    def k(self) -> int | None:
        """Connections per neuron where it is the same number everywhere, else None."""
        return self.hot_index.shape[1] if self.rows is None else None

    @property
    def columns(self) -> Tensor:
        """Column of each connection, within its group's fan_in; shaped as `hot_index`."""
        return self.hot[self.hot_index] % self.fan_in

    @property
    def nnz(self) -> int:
        """Number of selected connections."""
        return self.hot_index.numel()

    @property
    def device(self) -> torch.device:
        """Where the index tensors lie."""
        return self.hot_index.device

    def to(self, device: torch.device | str) -> SelectedPlaces:
        """The same places with every index tensor on `device`; itself where they lie there already."""
        if torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return SelectedPlaces(**moved)

    def pick(self, matrix: Tensor) -> Tensor:
        """The selected entries of a [neurons, fan_in] matrix: [neurons, K], or [nnz] where rows differ."""
        if self.rows is None:
            return matrix.gather(1, self.columns)
        return matrix[self.rows, self.columns]
