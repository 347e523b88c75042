"""What each way of computing a selected weight gradient costs on a CPU, by shape alone.

Nanoseconds an element, measured on two cores with AVX2 (fp32) by `benchmarks/ops_cost_model.py`, which prints this
table for another machine. Only their ratios matter, and only roughly: they choose between ways whose costs cross
slowly, so that a wrong choice near a crossing costs little. Shapes alone are read, so `torch.compile` can trace it.
"""

from __future__ import annotations

# X^T dY of X [N, W] and dY [N, O]: each element of dY is read once (FIXED) and multiplied W times.
PRODUCT_FIXED = 0.37
PRODUCT = 0.0103
# sum_n dY[n, o] X[n, slot[o]]: gather, multiply and add, for each connection and each n; the same where the rows of
# a ragged selection are gathered from dY too; and in a convolution whose channels lie first or last in memory.
GATHER = 1.0
GATHER_RAGGED = 2.2
GATHER_PLANES = 0.8
GATHER_PIXELS = 1.7
# The same for a few connections, whose columns stay in cache.
GATHER_RARE = 0.75
# Copying one element of a hot column out of an input.
COLUMN = 0.7
# The library's own weight gradient of a convolution, for each multiplication; of a grouped or depthwise one, whose
# channels lie first or last in memory.
LIBRARY = 0.0145
LIBRARY_GROUPED_PLANES = 0.37
LIBRARY_GROUPED_PIXELS = 0.15


def product(n: int, neurons: int, width: int) -> float:
    """A dense product over `width` columns."""
    return n * neurons * (PRODUCT_FIXED + PRODUCT * width)


def gather(n: int, connections: int, *, ragged: bool) -> float:
    """Gather, multiply and reduce for each connection of a linear layer."""
    return n * connections * (GATHER_RAGGED if ragged else GATHER)


def rare(n: int, connections: int) -> float:
    """The same for the few connections of a linear layer that a product leaves out."""
    return n * connections * GATHER_RARE


def uses_worth_a_product(neurons: int) -> float:
    """How many neurons must use a column for a product over it to be cheaper than a gather for each."""
    return neurons * PRODUCT / GATHER_RARE


def conv_gather(n: int, connections: int, *, ragged: bool, channels_last: bool) -> float:
    """The same of a convolution with `n` output positions in the batch."""
    each = GATHER_PIXELS if channels_last else GATHER_PLANES
    return n * connections * each * (GATHER_RAGGED / GATHER if ragged else 1.0)


def columns(n: int, width: int) -> float:
    """Copying `width` columns out of an input."""
    return n * width * COLUMN


def library(n: int, neurons: int, fan_in: int, groups: int, *, channels_last: bool) -> float:
    """The library's own convolution weight gradient."""
    grouped = LIBRARY_GROUPED_PIXELS if channels_last else LIBRARY_GROUPED_PLANES
    return n * neurons * fan_in * (LIBRARY if groups == 1 else grouped)
