"""Six measures of a mask, each of one image; a data set's figure is their mean over its images.

Every pixel counts: a background pixel that is painted costs in all six. All are taken at the image's own size, from the
map of probabilities as it is (it is not stretched to 0..1, so an empty map stays one). They equal py-sod-metrics'
(`normalize=False`), but for Dice and IoU of an image in which there is nothing and nothing is painted: 1 here, as
scikit-learn's with zero_division=1, and 0 there. That library is no dependency because it holds NumPy back and brings
OpenCV and scikit-image for a seventh measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from fewtune.errors import DataError
from fewtune.metrics import Interval, bootstrap, percent

THRESHOLD = 0.5
"""Probability from which a pixel is painted, for Dice and IoU."""
EPS = np.spacing(1)
NAMES = ("dice", "iou", "mae", "s_measure", "e_measure", "weighted_f")
TITLES = {
    "dice": "mDice", "iou": "mIoU", "mae": "MAE", "s_measure": "S-measure", "e_measure": "E-measure (mean)",
    "weighted_f": "weighted F",
}  # fmt: skip


@dataclass(frozen=True)
class MaskMeasures:
    """The measures of one image. All lie in 0..1 (the E-measure of a tiny image a little above), and more is better,
    but for mae.

    Attributes:
        dice: 2 TP / (2 TP + FP + FN) of the mask at probability 0.5; 1 where truth and mask are both empty.
        iou: TP / (TP + FP + FN), likewise.
        mae: mean |probability - truth|.
        s_measure: structure (Fan et al. 2017), alpha = 0.5, of the probabilities.
        e_measure: enhanced alignment (Fan et al. 2018), mean over the 256 thresholds of the map in 8 bits; no threshold
            is chosen on the images that are scored, as the maximum over thresholds would.
        weighted_f: Margolin et al. 2014, beta = 1, of the probabilities; 0 where the truth is empty.
    """

    dice: float
    iou: float
    mae: float
    s_measure: float
    e_measure: float
    weighted_f: float


def measure(probabilities: np.ndarray, truth: np.ndarray) -> MaskMeasures:
    """All measures of one image.

    Args:
        probabilities: [H, W], in 0..1, at the image's own size.
        truth: bool [H, W].

    Raises:
        DataError: the shapes differ, or a probability lies outside 0..1.
    """
    if probabilities.shape != truth.shape or truth.ndim != 2 or truth.dtype != np.bool_ or not truth.size:
        raise DataError(
            f"got probabilities {probabilities.shape} and a truth {truth.shape} of {truth.dtype}; expected [H, W] for "
            "both, and a truth of bool"
        )
    p = probabilities.astype(np.float64)
    if not (p.min() >= 0 and p.max() <= 1):  # NaN too
        raise DataError(f"probabilities must lie in 0..1, got {p.min():g} to {p.max():g}")
    painted = p >= THRESHOLD
    return MaskMeasures(
        dice=dice(painted, truth),
        iou=iou(painted, truth),
        mae=float(np.abs(p - truth).mean()),
        s_measure=s_measure(p, truth),
        e_measure=e_measure(p, truth),
        weighted_f=weighted_f(p, truth),
    )


def dice(painted: np.ndarray, truth: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of two boolean masks; 1 where both are empty."""
    both = int(painted.sum()) + int(truth.sum())
    return 2 * int((painted & truth).sum()) / both if both else 1.0


def iou(painted: np.ndarray, truth: np.ndarray) -> float:
    """TP / (TP + FP + FN) of two boolean masks; 1 where both are empty."""
    union = int((painted | truth).sum())
    return int((painted & truth).sum()) / union if union else 1.0


def s_measure(p: np.ndarray, truth: np.ndarray, alpha: float = 0.5) -> float:
    """Structure measure: alpha * object + (1 - alpha) * region (Fan et al. 2017, Eq. 8)."""
    share = truth.mean()
    if share == 0:
        return float(1 - p.mean())
    if share == 1:
        return float(p.mean())
    objects = share * _object(p[truth]) + (1 - share) * _object(1 - p[~truth])
    return float(max(0.0, alpha * objects + (1 - alpha) * _region(p, truth)))


def _object(values: np.ndarray) -> float:
    """How uniformly and how fully a region is painted."""
    mean = values.mean()
    spread = values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + spread + EPS)


def _region(p: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of the four quarters about the truth's centre, weighted by their areas."""
    row, column = (int(centre) + 1 for centre in np.argwhere(truth).mean(axis=0).round())
    total = 0.0
    for rows in (slice(None, row), slice(row, None)):
        for columns in (slice(None, column), slice(column, None)):
            quarter = truth[rows, columns]
            if quarter.size:
                total += _similarity(p[rows, columns], quarter) * quarter.size / truth.size
    return total


def _similarity(p: np.ndarray, truth: np.ndarray) -> float:
    x, y = p.mean(), truth.mean()
    count = p.size - 1 + EPS
    variance = (((p - x) ** 2).sum() + ((truth - y) ** 2).sum()) / count
    covariance = ((p - x) * (truth - y)).sum() / count
    above, below = 4 * x * y * covariance, (x**2 + y**2) * variance
    if above != 0:
        return float(above / (below + EPS))
    return 1.0 if below == 0 else 0.0


def e_measure(p: np.ndarray, truth: np.ndarray) -> float:
    """Enhanced-alignment measure, mean over the masks at thresholds 0..255 of the map in 8 bits (Fan et al. 2018).

    The measure of a mask depends on its four counts alone (TP, FP, FN, TN), which two histograms give for all
    thresholds at once.
    """
    levels = (p * 255).astype(np.uint8)
    hits, alarms = (
        np.cumsum(np.bincount(levels[where], minlength=256)[::-1]).astype(np.float64) for where in (truth, ~truth)
    )
    size, inside = truth.size, int(truth.sum())
    painted = hits + alarms
    if inside == 0:
        aligned = size - painted
    elif inside == size:
        aligned = painted
    else:
        x, y = painted / size, inside / size  # the means of mask and truth
        parts = ((hits, 1 - x, 1 - y), (alarms, 1 - x, -y), (inside - hits, -x, 1 - y))
        rest = (size - painted - (inside - hits), -x, -y)
        aligned = sum(count * (2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4 for count, a, b in (*parts, rest))
    return float((aligned / (size - 1 + EPS)).mean())


def weighted_f(p: np.ndarray, truth: np.ndarray, beta: float = 1.0) -> float:
    """Weighted F-measure (Margolin et al. 2014): errors of neighbouring pixels of the object are smoothed, errors of
    the background weigh the more the farther they lie from it. 0 where the truth is empty."""
    from scipy.ndimage import convolve, distance_transform_edt

    if not truth.any():
        return 0.0
    distance, nearest = distance_transform_edt(~truth, return_indices=True)
    error = np.abs(p - truth)
    spread = error[nearest[0], nearest[1]]  # a background pixel takes the error of the object pixel nearest to it
    smooth = convolve(spread, _gaussian(), mode="constant")
    error = np.where(truth & (smooth < error), smooth, error)
    weight = np.where(truth, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    error = error * weight
    recall = 1 - error[truth].mean()
    hits, alarms = truth.sum() - error[truth].sum(), error[~truth].sum()
    precision = hits / (hits + alarms + EPS)
    return float((1 + beta) * recall * precision / (recall + beta * precision + EPS))


def _gaussian(side: int = 7, sigma: float = 5.0) -> np.ndarray:
    """MATLAB's fspecial('gaussian', 7, 5)."""
    steps = np.arange(side) - (side - 1) / 2
    line = np.exp(-(steps**2) / (2 * sigma**2))
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


@dataclass(frozen=True)
class MaskReport:
    """Means over the images, with bootstrap intervals over the images."""

    images: int
    dice: Interval
    iou: Interval
    mae: Interval
    s_measure: Interval
    e_measure: Interval
    weighted_f: Interval

    def to_json(self) -> dict:
        """Plain dicts and numbers."""
        return asdict(self)

    def tables(self, title: str) -> list[list[dict[str, str]]]:
        """For a reader: every measure with its interval."""
        values = {name: asdict(getattr(self, name)) for name in NAMES}
        return [interval_rows(values, f"{self.images} {title}")]


def interval_rows(values: Mapping[str, Mapping[str, float]], title: str) -> list[dict[str, str]]:
    """Measures by name, with their intervals, as rows of text."""
    return [{title: TITLES[name], "in %, 95 % interval": percent(value)} for name, value in values.items()]


def mask_report(measures: list[MaskMeasures]) -> MaskReport:
    """Mean and 95 % bootstrap interval of every measure. DataError where there is no image."""
    columns = {name: np.array([getattr(one, name) for one in measures]) for name in NAMES}
    return MaskReport(images=len(measures), **{name: bootstrap(values) for name, values in columns.items()})
