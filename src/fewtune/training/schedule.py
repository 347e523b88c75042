"""The learning rate of every step: linear warm-up, then a half cosine."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, start: float = 1e-7, end: float = 1e-8) -> float:
    """Learning rate of `step` (from 0) out of `steps`.

    Linear from `start` at step 0 to `peak` at step `warmup`, then peak * cosine down to `end` at the last step
    (Loshchilov and Hutter 2017). A `peak` below `start` or `end` is kept as it is.
    """
    start, end = min(start, peak), min(end, peak)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2
