"""Intervals of means and of differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fewtune.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval: Wilson's of a proportion, by bootstrap (percentiles) of other means."""

    value: float
    low: float
    high: float
    level: float = 0.95


def wilson(hits: np.ndarray, *, level: float = 0.95) -> Interval:
    """The mean of `hits` [N] (0/1) with Wilson's interval, see `proportion`."""
    return proportion(int(np.count_nonzero(hits)), len(hits), level=level)


def proportion(right: int, images: int, *, level: float = 0.95) -> Interval:
    """A single proportion, `right` among `images`, and Wilson's score interval of it (1927).

    Of n right among n it is not [1, 1], as a bootstrap's would be.
    """
    from scipy.stats import binomtest  # half a second, which a prediction need not wait for

    if images == 0:
        raise DataError("there are no predictions to measure")
    bounds = binomtest(right, images).proportion_ci(level, method="wilson")
    return Interval(right / images, float(bounds.low), float(bounds.high), level)


def bootstrap(values: np.ndarray, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of `values` [N] and the percentile interval of the mean over resampled images.

    Efron (1979). For 0/1 values the resampled count of ones is binomial, which is drawn directly.
    """
    if len(values) == 0:
        raise DataError("there are no predictions to measure")
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=samples) @ distinct / len(values)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high), level)


def paired_bootstrap(first: np.ndarray, second: np.ndarray, **options: float) -> Interval:
    """Interval of the accuracy of `second` minus that of `first` on the same images, resampled together.

    Both are 0/1 per image, [N]; a positive value means that `second` is better.
    """
    if len(first) != len(second):
        raise DataError(f"paired predictions need the same images, got {len(first)} and {len(second)}")
    return bootstrap(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), **options)  # type: ignore[arg-type]


def percent(interval: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
