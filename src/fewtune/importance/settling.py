"""Whether a selection has settled, so that the rest of the images need not be scored."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from fewtune.neurons import View

log = logging.getLogger("fewtune")


class Settling:
    """Looks, as images are scored, at the connection with the largest score of every neuron.

    Settled is what agrees with itself: after 2, 4, 6, 8, 12, 16, 24, … batches, the share of the neurons whose largest
    connection is that of half as many batches must be `agreement`. One connection a neuron is looked at whatever K is,
    so that scores do not depend on K.
    """

    def __init__(self, views: Mapping[str, View], agreement: float) -> None:
        self.views, self.agreement = views, agreement
        self._largest: dict[int, dict[str, Tensor]] = {}

    def __call__(self, batches: int, sums: Mapping[str, Tensor]) -> bool:
        """Whether the signed sums over so many batches have settled. To be called after every batch."""
        if not _looked_at(batches):
            return False
        now = {name: self.views[name].matrix(tensor).abs().argmax(1) for name, tensor in sums.items()}
        before = self._largest.get(batches // 2) if batches % 2 == 0 else None
        self._largest[batches] = now
        if before is None:
            return False
        same = sum(int(torch.eq(now[name], before[name]).sum()) for name in now)
        share = same / sum(largest.numel() for largest in now.values())
        if share >= self.agreement:
            log.info("scored %d batches: %.0f %% of the neurons agree with half as many", batches, 100 * share)
        return share >= self.agreement


def _looked_at(batches: int) -> bool:
    """Powers of two, and three times those."""
    while batches % 2 == 0:
        batches //= 2
    return batches in (1, 3)
