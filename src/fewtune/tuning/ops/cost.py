"""Cost on a CPU of each way to compute a selected weight gradient, from shapes alone.

Nanoseconds an element, measured on two cores with AVX-512 (fp32, oneDNN's products) by
`benchmarks/speed/ops_cost_model.py`, which prints this table for another machine. Only their ratios matter, and only
roughly: they choose between ways whose costs cross slowly, so that a wrong choice near a crossing costs little.
Shapes alone are read, so `torch.compile` can trace it.
"""

from __future__ import annotations

from torch import Tensor

# A copy of the hot columns is kept where it is at most this share of the input; above it the copy costs more
# time than the bytes are worth, and the input itself is kept (by reference).
KEEP_SHARE = 0.75
# A product over a number of columns that this divides is fast; over others it takes as long as over the next one.
LANES = 16
# X^T dY of X [N, W] and dY [N, O]: each element of dY is read once (FIXED) and multiplied W times.
PRODUCT_FIXED = 0.1
PRODUCT = 0.0047
# sum_n dY[n, o] X[n, column[o]]: gather, multiply and add, for each connection and each n; the same where the rows of
# a ragged selection are gathered from dY too; and in a convolution whose channels lie first or last in memory.
GATHER = 0.29
GATHER_RAGGED = 0.57
GATHER_PLANES = 0.64
GATHER_PIXELS = 0.53
# The same where a grouped convolution, channels last, picks the columns: half of the gather in side-by-side runs.
PICK = 0.27
# The same for a few connections, whose columns stay in cache; beside it, for each element of dY that their gather
# passes by, and, in nanoseconds, for its calls.
GATHER_RARE = 0.44
RARE_SWEEP = 0.031
RARE_CALL = 27e3
# Rows for which the columns of a product are chosen, before any input is seen.
TYPICAL_ROWS = 1536
# Copying one element of a hot column out of an input.
COLUMN = 0.2
# Columns, and columns times neurons, from which on a product over a convolution's columns is faster as the gradient of
# a 1 x 1 convolution.
POINTWISE_COLUMNS = 32
POINTWISE_WEIGHTS = 2**13
# The library's own weight gradient of a convolution, for each multiplication; of a grouped or depthwise one, whose
# channels lie first or last in memory.
LIBRARY = 0.0048
LIBRARY_GROUPED_PLANES = 0.29
LIBRARY_GROUPED_PIXELS = 0.078


def product(n: int, neurons: int, width: int) -> float:
    """A dense product over `width` columns."""
    return n * neurons * (PRODUCT_FIXED + PRODUCT * filled(width))


def gather(n: int, connections: int, *, ragged: bool) -> float:
    """Gather, multiply and reduce for each connection of a linear layer."""
    return n * connections * (GATHER_RAGGED if ragged else GATHER)


def rare(n: int, neurons: int, connections: int) -> float:
    """The same for the few connections of a linear layer that a product leaves out: dY is swept for them once more."""
    return RARE_CALL + n * (connections * GATHER_RARE + neurons * RARE_SWEEP) if connections else 0.0


def filled(width: int) -> int:
    """The least multiple of LANES that is not below `width`."""
    return -(-width // LANES) * LANES


def worth_a_product(uses: Tensor, neurons: int, n: int = TYPICAL_ROWS) -> int:
    """Over how many of the hot columns a product is computed, so that it and the rare connections cost the least.

    Args:
        uses: [H] connections of each hot column, the most used first.
        neurons: of the layer.
        n: rows of X and dY, of which the choice depends little.
    """
    left, columns = uses.sum() - uses.cumsum(0), len(uses)
    candidates = [0, *range(LANES - 1, columns, LANES), columns]  # a column of ones goes with them
    rest = [int(left[c - 1]) if c else int(uses.sum()) for c in candidates]
    costs = [product(n, neurons, 1 + c) + rare(n, neurons, r) for c, r in zip(candidates, rest, strict=True)]
    return candidates[costs.index(min(costs))]


def conv_gather(n: int, connections: int, *, ragged: bool, channels_last: bool) -> float:
    """The same of a convolution with `n` output positions in the batch."""
    each = GATHER_PIXELS if channels_last else GATHER_PLANES
    return n * connections * each * (GATHER_RAGGED / GATHER if ragged else 1.0)


def pick(n: int, connections: int) -> float:
    """The same where the convolution itself picks the columns."""
    return n * connections * PICK


def columns(n: int, width: int) -> float:
    """Copying `width` columns out of an input."""
    return n * width * COLUMN


def library(n: int, neurons: int, fan_in: int, groups: int, *, channels_last: bool) -> float:
    """The library's own convolution weight gradient."""
    grouped = LIBRARY_GROUPED_PIXELS if channels_last else LIBRARY_GROUPED_PLANES
    return n * neurons * fan_in * (LIBRARY if groups == 1 else grouped)
