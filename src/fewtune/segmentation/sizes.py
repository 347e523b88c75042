"""Mask logits at another size."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits [B, 1, h, w] resampled to `size` (height, width), bilinearly; a probability is taken only then."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
