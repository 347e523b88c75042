"""Mean average precision and F1 of images that may have any number of classes, and the thresholds that F1 needs.

Average precision and F1 are torchmetrics'; intervals are of images drawn again with replacement (Efron 1979).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_precision_recall_curve,
    multilabel_recall,
)

from fewtune.errors import DataError
from fewtune.metrics import Interval, bootstrap, percent

THRESHOLD = 0.5
"""The probability from which a class is predicted where no validation image tells a better one."""
SAMPLES = 1000
"""Draws of an interval."""


@dataclass(frozen=True)
class MultiLabelReport:
    """What `evaluate` says of one set of predictions; tuples run over classes, fractions lie in 0..1.

    Attributes:
        map: mean average precision over the classes that any image has; no threshold is in it.
        f1: mean F1 over these classes, at the thresholds.
        f1_images: mean over images of the F1 of an image's classes; 1 where it has none and none is predicted.
        f1_micro: F1 of all decisions together.
        average_precision: None for a class that no image has.
        support: images that have the class.
    """

    images: int
    map: Interval
    f1: Interval
    f1_images: Interval
    f1_micro: float
    class_names: tuple[str, ...]
    thresholds: tuple[float, ...]
    average_precision: tuple[float | None, ...]
    f1_by_class: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    support: tuple[int, ...]

    def to_json(self) -> dict:
        """Plain dicts, lists and numbers."""
        return json.loads(json.dumps(asdict(self)))

    def tables(self, title: str) -> list[list[dict[str, str]]]:
        """For a reader: the measures of all images, then those of every class."""
        whole = {
            "images": str(self.images),
            "mean average precision, 95 % interval": f"{percent(asdict(self.map))} %",
            "F1, mean over classes, 95 % interval": f"{percent(asdict(self.f1))} %",
            "F1, mean over images, 95 % interval": f"{percent(asdict(self.f1_images))} %",
            "F1 of all decisions together": f"{100 * self.f1_micro:.1f} %",
        }
        classes = zip(
            self.class_names, self.support, self.average_precision, self.f1_by_class, self.precision, self.recall,
            self.thresholds, strict=True,
        )  # fmt: skip
        return [
            [{title: key, "": value} for key, value in whole.items()],
            [
                {"class": name, "images": str(n), "average precision": "-" if ap is None else f"{ap:.3f}",
                 "F1": f"{f1:.3f}", "precision": f"{p:.3f}", "recall": f"{r:.3f}", "threshold": f"{threshold:.3f}"}
                for name, n, ap, f1, p, r, threshold in classes
            ],
        ]  # fmt: skip


def report(
    probabilities: Tensor, labels: Tensor, class_names: tuple[str, ...], thresholds: Sequence[float]
) -> MultiLabelReport:
    """All measures of `probabilities` [N, C] against `labels` of 0 and 1 [N, C].

    Raises:
        DataError: there is no image, or the shapes differ.
    """
    count = len(class_names)
    if not len(labels) or probabilities.shape != labels.shape or probabilities.shape[1] != count:
        raise DataError(
            f"expected probabilities and labels of shape (images, {count}), got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}"
        )
    truth = labels.long()
    predicted = (probabilities >= torch.tensor(thresholds, dtype=probabilities.dtype)).long()
    by_class: dict[str, Any] = {"num_labels": count, "average": "none"}
    support = truth.sum(0)
    average = multilabel_average_precision(probabilities, truth, **by_class)
    f1 = multilabel_f1_score(predicted, truth, **by_class)
    present = support > 0
    draws = _draws(len(truth))
    p, y, hits = probabilities.numpy(), truth.numpy(), predicted.numpy()
    return MultiLabelReport(
        images=len(truth),
        map=_interval(mean_average_precision(probabilities, truth), resampled_map(p, y, draws)),
        f1=_interval(float(f1[present].mean()) if present.any() else 0.0, _resampled_f1(hits, y, draws)),
        f1_images=bootstrap(f1_of_images(predicted, truth).numpy()),
        f1_micro=float(multilabel_f1_score(predicted, truth, num_labels=count, average="micro")),
        class_names=class_names,
        thresholds=tuple(thresholds),
        average_precision=tuple(float(a) if here else None for a, here in zip(average, present, strict=True)),
        f1_by_class=tuple(f1.tolist()),
        precision=tuple(multilabel_precision(predicted, truth, **by_class).tolist()),
        recall=tuple(multilabel_recall(predicted, truth, **by_class).tolist()),
        support=tuple(support.tolist()),
    )


def mean_average_precision(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over the classes that any image has, of `probabilities` and `labels` [N, C]; 0 where there is none."""
    present = labels.sum(0) > 0
    if not present.any():
        return 0.0
    by_class = multilabel_average_precision(probabilities, labels, num_labels=labels.shape[1], average="none")
    return float(by_class[present].mean())


def f1_of_images(predicted: Tensor, labels: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of each image's classes, [N]; 1 where it has none and none is predicted."""
    hits, both = (predicted * labels).sum(1), predicted.sum(1) + labels.sum(1)
    return torch.where(both > 0, 2 * hits / both.clamp(min=1), torch.ones(len(labels)))


def best_thresholds(probabilities: Tensor, labels: Tensor) -> tuple[float, ...]:
    """For each class the threshold with the largest F1 on these images [N, C], half-way to the next lower probability.

    A class that no image has, or that every image has, keeps 0.5.
    """
    curves = multilabel_precision_recall_curve(probabilities, labels.long(), num_labels=labels.shape[1])
    thresholds = []
    for c, (precision, recall, steps) in enumerate(zip(*curves, strict=True)):
        if not 0 < int(labels[:, c].sum()) < len(labels):
            thresholds.append(THRESHOLD)
            continue
        f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(precision.dtype).tiny)
        best = float(steps[f1[: len(steps)].argmax()])
        column = probabilities[:, c]
        lower = column[column < best]
        thresholds.append((best + float(lower.max())) / 2 if len(lower) else best)
    return tuple(thresholds)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (value, value)
    return Interval(value, float(low), float(high))


def _draws(images: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn, [SAMPLES, images]."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=SAMPLES)


def resampled_map(probabilities: np.ndarray, labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean average precision of every draw, [draws]; NaN where a draw has no class at all."""
    columns = [_resampled_ap(p, y, draws) for p, y in zip(probabilities.T, labels.T, strict=True) if y.any()]
    if not columns:
        return np.zeros(len(draws))
    values = np.stack(columns)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)


def _resampled_ap(scores: np.ndarray, truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Average precision of one class in every draw: sum over thresholds of (R_n - R_n-1) P_n."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of images with one score
    counts = draws[:, order]
    every = counts.cumsum(1)[:, last]
    hits = (counts * truth[order]).cumsum(1)[:, last]
    with np.errstate(invalid="ignore"):
        recall, precision = hits / hits[:, -1:], hits / np.maximum(every, 1)
    return (np.diff(recall, axis=1, prepend=0) * precision).sum(1)


def _resampled_f1(predicted: np.ndarray, labels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean F1 of every draw over the classes that any image has, [draws]."""
    here = labels.any(0)
    hits, both = draws @ (predicted * labels)[:, here], draws @ (predicted + labels)[:, here]
    return (2 * hits / np.maximum(both, 1)).mean(1) if here.any() else np.zeros(len(draws))


def paired_map(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> tuple[float, float, Interval]:
    """Mean average precision of two sets of probabilities of the same images [N, C], and second minus first with its
    interval: both are taken of the same draws."""
    truth = torch.from_numpy(labels).long()
    one, two = (mean_average_precision(torch.from_numpy(p), truth) for p in (first, second))
    draws = _draws(len(labels))
    gap = resampled_map(second, labels, draws) - resampled_map(first, labels, draws)
    return one, two, _interval(two - one, gap)
