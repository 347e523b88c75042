"""Consistency: a penalty on how far an image's logits are from those of the epoch before (PACE's fast form).

.. math:: \\lambda \\, \\frac{1}{B} \\sum_i \\| f_e(x_i) - f_{e-1}(x_i) \\|^2

Ni, Zhang and Koniusz, NeurIPS 2024. With noise on what tuning changed (`fewtune.tuning.noise`) two epochs see two draws
of it, as of the augmentation. Their code compares the first epoch with zeros; here it has no penalty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Consistency:
    """The logits of every training image in the epoch before, [N, C]; None within the first epoch."""

    def __init__(self, weight: float, images: int) -> None:
        self.weight, self.images = weight, images
        self.before: Tensor | None = None
        self._now: list[tuple[Tensor, Tensor]] = []

    def penalty(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The penalty of a batch [B, C] of these images, which are remembered."""
        self._now.append((indices, logits.detach().float()))
        if self.before is None:
            return logits.new_zeros(())
        before = self.before[indices.cpu()].to(logits)
        return self.weight * (logits - before).square().sum(-1).mean()

    def end_epoch(self, everyones: Callable[[Tensor], Tensor]) -> None:
        """What was remembered becomes the epoch before; `everyones` joins what all processes saw, on the CPU."""
        indices, logits = (everyones(torch.cat(column)) for column in zip(*self._now, strict=True))
        before = torch.zeros(self.images, logits.shape[1]) if self.before is None else self.before.clone()
        before[indices] = logits
        self.before, self._now = before, []

    def state_dict(self) -> dict[str, Tensor]:
        """The logits, where there are some."""
        return {} if self.before is None else {"before": self.before}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved logits."""
        self.before = state.get("before")
