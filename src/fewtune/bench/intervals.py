"""Intervals of paired differences over seeds and test images together, for one task and for the mean over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from fewtune.errors import DataError


@dataclass(frozen=True)
class Difference:
    """A mean difference, its standard error, and the degrees of freedom of that error.

    Attributes:
        seeds: how many seeds it is from; of a mean over tasks the fewest. With one seed the error holds the test
            images alone.
    """

    value: float
    error: float
    freedom: float
    seeds: int

    def _times(self, probability: float) -> float:
        return float(student.ppf(probability, self.freedom)) * self.error if self.error > 0 else 0.0

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - self._times(0.975)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + self._times(0.975)

    @property
    def seen(self) -> float:
        """The smallest true difference that would have been told from 0 in four of five repetitions (5 % level)."""
        return self._times(0.975) + self._times(0.8)

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def over_seeds_and_images(values: np.ndarray) -> Difference:
    """The mean of paired differences `values` [seeds, images], both of them drawn at random.

    A two-way layout with random rows (seed) and columns (image) and one value a cell, d = m + s + i + e. The variance
    of the mean is estimated without bias by A / S + B / N - E / (S N), where A and B are the variances of the seeds'
    and of the images' means and E that of the residuals (Searle, Casella and McCulloch, Variance Components, 1992);
    the degrees of freedom are Satterthwaite's (1946). It is never taken to be below either of the first two terms.

    Raises:
        DataError: no image.
    """
    seeds, images = values.shape
    if images < 2:
        raise DataError(f"an interval needs at least two test images, got {images}")
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), float(values.mean())
    of_images = float(columns.var(ddof=1)) / images
    if seeds == 1:
        return Difference(mean, math.sqrt(of_images), images - 1, 1)
    of_seeds = float(rows.var(ddof=1)) / seeds
    residual = values - rows[:, None] - columns[None, :] + mean
    of_cells = float((residual**2).sum()) / ((seeds - 1) * (images - 1)) / (seeds * images)
    variance = max(of_seeds + of_images - of_cells, of_seeds, of_images)
    spread = of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1)
    return Difference(mean, math.sqrt(variance), variance**2 / spread if spread > 0 else images - 1, seeds)


def mean_difference(tasks: Sequence[Difference]) -> Difference:
    """The mean over tasks, which are fixed: only their seeds and images are drawn, independently of each other."""
    variances = [task.error**2 / len(tasks) ** 2 for task in tasks]
    spread = sum(variance**2 / task.freedom for variance, task in zip(variances, tasks, strict=True))
    value = sum(task.value for task in tasks) / len(tasks)
    freedom = sum(variances) ** 2 / spread if spread > 0 else min(task.freedom for task in tasks)
    return Difference(value, math.sqrt(sum(variances)), freedom, min(task.seeds for task in tasks))
