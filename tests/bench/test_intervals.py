"""Intervals over seeds and images: how often they hold the truth, on numbers whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewtune.bench.intervals import Difference, mean_difference, over_seeds_and_images
from fewtune.errors import DataError


def _drawn(rng: np.random.Generator, seeds: int, images: int, of: tuple[float, float, float]) -> np.ndarray:
    """Differences with the true mean 0 and these standard deviations of seeds, images and the rest."""
    rows, columns, rest = of
    return rng.normal(0, rows, (seeds, 1)) + rng.normal(0, columns, (1, images)) + rng.normal(0, rest, (seeds, images))


@pytest.mark.parametrize("of", [(0.05, 0.3, 0.3), (0.0, 0.5, 0.1), (0.1, 0.0, 0.5)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_ninety_five_of_a_hundred_intervals_hold_the_truth(of: tuple[float, float, float], seeds: int) -> None:
    rng = np.random.default_rng(0)
    intervals = [over_seeds_and_images(_drawn(rng, seeds, 100, of)) for _ in range(1000)]
    held = sum(one.low <= 0 <= one.high for one in intervals) / 1000
    assert held >= 0.93


def test_the_mean_over_tasks_holds_it_too() -> None:
    rng = np.random.default_rng(1)
    means = [
        mean_difference([over_seeds_and_images(_drawn(rng, 5, 100, (0.05, 0.3, 0.3))) for _ in range(5)])
        for _ in range(1000)
    ]
    held = sum(one.low <= 0 <= one.high for one in means) / 1000
    assert 0.93 <= held <= 0.98


def test_the_smallest_difference_that_is_seen_is_seen_four_times_in_five() -> None:
    rng = np.random.default_rng(2)
    of = (0.0, 0.4, 0.0)
    true = over_seeds_and_images(_drawn(rng, 1, 4000, of)).seen
    seen = sum(over_seeds_and_images(true + _drawn(rng, 1, 4000, of)).told_apart for _ in range(1000)) / 1000
    assert seen == pytest.approx(0.8, abs=0.04)


def test_equal_runs_differ_by_nothing() -> None:
    none = over_seeds_and_images(np.zeros((3, 10)))
    assert (none.value, none.low, none.high, none.told_apart) == (0, 0, 0, False)
    assert mean_difference([none, Difference(0.2, 0.1, 4.0, 3)]).error == pytest.approx(0.05)


def test_one_seed_holds_images_alone() -> None:
    values = np.array([[1.0, 0.0, 0.0, -1.0, 1.0]])
    got = over_seeds_and_images(values)
    assert got.error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert (got.freedom, got.seeds) == (4, 1)
    with pytest.raises(DataError, match="at least two test images"):
        over_seeds_and_images(np.ones((3, 1)))
