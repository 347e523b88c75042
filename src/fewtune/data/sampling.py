"""Stratified, seeded draws from a labelled set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

WINDOW = 8
"""So many blocks are shuffled among each other where images are read in blocks."""


def stratified(labels: Sequence[int], count: int, seed: int, *, keep: int = 0, at_least: int = 0) -> np.ndarray:
    """The sorted indices of `count` of the items, each class by its share (largest remainders).

    Every class leaves at least `keep` items behind and gives at least `at_least`, as far as it has them; so fewer
    than `count` may come back where `keep` binds everywhere. The same labels, count and seed give the same items.
    """
    array = np.asarray(labels)
    classes, sizes = np.unique(array, return_counts=True)
    quotas = _quotas(sizes, count, np.minimum(at_least, sizes), np.maximum(sizes - keep, 0))
    random = np.random.default_rng(seed)
    drawn = []
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(array == label)
        drawn.append(random.permutation(members)[:quota])
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)


def few_of_each(labels: Sequence[int], count: int, seed: int) -> np.ndarray:
    """The sorted indices of `count` items of every class, or of all where a class has fewer."""
    array = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(array))
    order = order[np.argsort(array[order], kind="stable")]  # by class, shuffled within
    _, starts, sizes = np.unique(array[order], return_index=True, return_counts=True)
    rank = np.arange(len(array)) - np.repeat(starts, sizes)
    return np.sort(order[rank < count])


def complement(indices: np.ndarray, size: int) -> np.ndarray:
    """The indices of 0..size-1 that are not in `indices`, sorted."""
    mask = np.ones(size, dtype=bool)
    mask[indices] = False
    return np.flatnonzero(mask)


def _quotas(sizes: np.ndarray, count: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whole numbers within [low, high] that sum to `count` where that is possible, nearest to the classes' shares.

    One more is given, or one taken, where the number lies furthest below or above the class's share.
    """
    shares = count * sizes / max(sizes.sum(), 1)
    low = np.minimum(low, high)
    quotas = np.clip(np.floor(shares).astype(int), low, high)
    while quotas.sum() != count:
        step = 1 if quotas.sum() < count else -1
        open_ = quotas < high if step > 0 else quotas > low
        if not open_.any():
            return quotas
        distance = np.where(open_, step * (shares - quotas), -np.inf)
        quotas[int(distance.argmax())] += step
    return quotas


def block_order(blocks: Sequence[Hashable], seed: int) -> np.ndarray:
    """A permutation that reads blocks about once: the blocks in a random order, and the items of every `WINDOW` of
    them that follow each other in a random order.

    Args:
        blocks: which block each item is in.
    """
    numbers: dict[Hashable, int] = {}
    block = np.array([numbers.setdefault(name, len(numbers)) for name in blocks])
    random = np.random.default_rng(seed)
    window = random.permutation(len(numbers))[block] // WINDOW
    order = random.permutation(len(block))
    return order[np.argsort(window[order], kind="stable")]
