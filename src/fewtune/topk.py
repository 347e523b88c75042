"""The largest scores by neuron, by layer, over the network or by column, ties broken by order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from sys import float_info

import torch
from torch import Tensor

from fewtune.errors import SelectionError
from fewtune.neurons import Places


def top_mask(scores: Tensor, counts: int) -> Tensor:
    """True at the ``counts`` largest of each row of [rows, columns]; among equals the first columns win."""
    counts = min(counts, scores.shape[1])
    if counts <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    smallest = scores.topk(counts, dim=1).values[:, -1:]
    mask = scores >= smallest
    if int(mask.sum()) == counts * len(scores):  # no ties at the edge
        return mask
    above, equal = scores > smallest, scores == smallest
    room = counts - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def wanted_connections(matrices: Mapping[str, Tensor], k: float | None, budget: float | None) -> float:
    """k itself, or the k (fractional) whose sum of min(k, fan_in) over all neurons is the budget's number.

    Raises:
        SelectionError: neither or both are given, or the value is out of range.
    """
    if (k is None) == (budget is None):
        raise SelectionError(f"select got k={k} and budget={budget}; give exactly one of them")
    value, name = (k, "k") if k is not None else (budget, "budget")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or not number or not 0 < value <= float_info.max:
        beyond = isinstance(value, int) and abs(value) > float_info.max  # of hundreds of digits, beyond every float
        raise SelectionError(f"{name}={'1e309 or more' if beyond else repr(value)}; expected a number above 0")
    if k is not None:
        return k
    assert budget is not None
    if budget > 1:
        raise SelectionError(f"budget={budget}; expected a fraction of the backbone's connections in (0, 1]")
    total = round(budget * sum(m.numel() for m in matrices.values()))
    whole = 0
    while _total(matrices, whole + 1) <= total and whole < max(m.shape[1] for m in matrices.values()):
        whole += 1
    more = _total(matrices, whole + 1) - _total(matrices, whole)
    return whole + ((total - _total(matrices, whole)) / more if more else 0.0)


def _total(matrices: Mapping[str, Tensor], k: float) -> float:
    return sum(m.shape[0] * min(k, m.shape[1]) for m in matrices.values())


def granular_top_k(
    matrices: Mapping[str, Tensor],
    k: float | None,
    budget: float | None,
    granularity: str,
    sets: Mapping[str, int] | None = None,
) -> dict[str, Places]:
    """The selected places of every scored matrix [neurons, fan_in]; see `fewtune.select`.

    ``sets``: into how many equal sets with inputs of their own a matrix's neurons fall; one where left out.
    """
    wanted = wanted_connections(matrices, k, budget)
    masks: Iterable[tuple[str, Tensor]]
    match granularity:
        case "neuron":
            masks = _by_neuron(matrices, wanted).items()
        case "layer":
            counts = {name: round(_total({name: m}, wanted)) for name, m in matrices.items()}
            masks = (pair for name, m in matrices.items() for pair in _largest({name: m}, counts[name]))
        case "columns":
            masks = ((name, _by_column(m, wanted, (sets or {}).get(name, 1))) for name, m in matrices.items())
        case _:
            masks = _largest(matrices, round(_total(matrices, wanted)))
    places = ((name, Places.from_mask(mask)) for name, mask in masks)
    return {name: p for name, p in places if len(p)}


def _by_neuron(matrices: Mapping[str, Tensor], wanted: float) -> dict[str, Tensor]:
    whole = int(wanted)
    if whole < 1:
        raise SelectionError(
            f"that is {wanted:.3g} connections a neuron; granularity 'neuron' needs at least one: raise k or budget, "
            "or take granularity='layer' or 'network'"
        )
    masks = {name: top_mask(m, whole) for name, m in matrices.items()}
    extra = round(_total(matrices, wanted)) - int(_total(matrices, whole))  # rounded as for a layer or the network
    if not extra:
        return masks
    # The next connection of every neuron that has one left; the neurons with the largest of them get one more.
    rest = {name: m.masked_fill(masks[name], -1.0) for name, m in matrices.items() if m.shape[1] > whole}
    best = {name: m.max(dim=1) for name, m in rest.items()}
    chosen = dict(_largest({name: b.values[:, None] for name, b in best.items()}, extra))
    for name, b in best.items():
        masks[name] = masks[name].scatter(1, b.indices[:, None], chosen[name])
    return masks


def _by_column(matrix: Tensor, wanted: float, sets: int) -> Tensor:
    """The same ``wanted`` columns in every row of a set: those with the largest sums of squares."""
    if wanted % 1 or wanted < 1:
        raise SelectionError(
            f"that is {wanted:.4g} connections a neuron; with granularity 'columns' all neurons of a layer have the "
            f"same whole number of them: take k={max(1, round(wanted))}"
        )
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    shares = wide / wide.max().clamp(min=torch.finfo(wide.dtype).tiny)  # squares of small scores would be zero
    mask = top_mask(shares.view(sets, -1, matrix.shape[1]).square().sum(1), int(wanted))
    return mask.repeat_interleave(len(matrix) // sets, 0)


def _largest(matrices: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    """By name, true at the ``count`` largest scores over all matrices together; among equals the first in order win.

    Nothing is sorted: the smallest score that is kept is found by counting, then each matrix is compared with it.
    """
    total = sum(m.numel() for m in matrices.values())
    if not 0 < count < total:
        yield from ((name, torch.full(m.shape, count > 0, device=m.device)) for name, m in matrices.items())
        return
    dtype = reduce(torch.promote_types, (m.dtype for m in matrices.values()), torch.float32)
    smallest, room = _edge(lambda: (m.to(dtype) for m in matrices.values()), count)
    for name, m in matrices.items():
        wide, edge = m.to(dtype), smallest.to(m.device)
        mask = wide >= edge
        equal = wide == edge
        ties = int(equal.sum())
        if ties > room:
            kept = equal.reshape(-1).cumsum(0).view(m.shape) <= room
            mask &= ~equal | kept
        room -= min(ties, room)
        yield name, mask


DIGIT = 16
"""Bits of a score that one pass of `_edge` counts by."""


def _edge(scores: Callable[[], Iterable[Tensor]], count: int) -> tuple[Tensor, int]:
    """The ``count``-th largest of some scores (never negative, not NaN), and how many that equal it are among them.

    The bits of floating-point numbers from 0 on are in the order of the numbers. So each pass counts the scores by
    their next 16 bits, among those that have the leading bits which are known of the one that is sought.
    """
    first = next(iter(scores()))
    dtype, bits = first.dtype, 8 * first.itemsize
    integer = torch.int64 if bits == 64 else torch.int32
    prefix = 0
    for shift in range(bits - DIGIT, -1, -DIGIT):
        histogram = torch.zeros(2**DIGIT, dtype=torch.int64)
        for part in scores():
            for chunk in part.reshape(-1).split(2**20):
                number = (chunk + 0.0).view(integer)  # -0.0 becomes 0.0
                if shift < bits - DIGIT:
                    number = number[number >> (shift + DIGIT) == prefix]
                histogram += torch.bincount((number >> shift) & (2**DIGIT - 1), minlength=2**DIGIT).cpu()
        above = histogram.flip(0).cumsum(0)
        digit = int(torch.searchsorted(above, count))
        count -= int(above[digit - 1]) if digit else 0
        prefix = (prefix << DIGIT) | (2**DIGIT - 1 - digit)
    return torch.tensor(prefix, dtype=integer).view(dtype), count
