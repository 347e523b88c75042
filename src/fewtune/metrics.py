"""Accuracy and its kin, with bootstrap intervals.

Every measure is computed once, from the probabilities of all test images, so that nothing depends on batches.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_precision,
    multiclass_recall,
)

from fewtune.errors import DataError

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class Report:
    """What `evaluate` says of one set of predictions; lists run over classes, fractions lie in 0..1."""

    images: int
    accuracy: Interval
    balanced_accuracy: float
    calibration_error: float
    class_names: tuple[str, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    support: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict:
        """Plain dicts, lists and numbers."""
        return json.loads(json.dumps(asdict(self)))


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


def report(probabilities: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Report:
    """All measures of `probabilities` [N, C] against `labels` [N].

    Balanced accuracy is the mean recall over the classes that occur among the labels. The calibration error is
    the expected one over 15 equal bins (Guo et al. 2017). Precision of a class that is never predicted, and
    recall of one that never occurs, are 0.
    """
    classes = len(class_names)
    if probabilities.shape != (len(labels), classes):
        raise DataError(f"expected probabilities of shape ({len(labels)}, {classes}), got {tuple(probabilities.shape)}")
    predicted = probabilities.argmax(dim=1)
    support = torch.bincount(labels, minlength=classes)
    recall = multiclass_recall(predicted, labels, num_classes=classes, average="none")
    precision = multiclass_precision(predicted, labels, num_classes=classes, average="none")
    confusion = multiclass_confusion_matrix(predicted, labels, num_classes=classes)
    calibration = multiclass_calibration_error(
        probabilities.float(), labels, num_classes=classes, n_bins=CALIBRATION_BINS, norm="l1"
    )
    return Report(
        images=len(labels),
        accuracy=bootstrap((predicted == labels).numpy()),
        balanced_accuracy=float(recall[support > 0].mean()),
        calibration_error=float(calibration),
        class_names=class_names,
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        support=tuple(support.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )
