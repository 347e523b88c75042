"""IoU and Dice of masks of several classes, from counts of pixels.

A class's figure is that of all pixels of all images together, as the field reports mean IoU; intervals are of images
drawn again with replacement (Efron 1979). They equal scikit-learn's jaccard_score and f1_score over those pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fewtune.errors import DataError
from fewtune.metrics import Interval, bootstrap, percent

SAMPLES = 1000
"""Draws of an interval."""


@dataclass(frozen=True)
class SemanticReport:
    """What `evaluate` says of masks of several classes; tuples run over classes, fractions lie in 0..1.

    Attributes:
        miou: mean IoU over the classes that any mask has.
        mdice: mean Dice over the same classes.
        dice: mean over images of `dice_of_image`.
        accuracy: share of the pixels that are right.
        iou_by_class: TP / (TP + FP + FN) of a class's pixels; None for a class that no mask has.
        dice_by_class: 2 TP / (2 TP + FP + FN), likewise.
        confusion: pixels by true class (row) and predicted class.
    """

    images: int
    miou: Interval
    mdice: Interval
    dice: Interval
    accuracy: float
    class_names: tuple[str, ...]
    iou_by_class: tuple[float | None, ...]
    dice_by_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict:
        """Plain dicts, lists and numbers."""
        return json.loads(json.dumps(asdict(self)))

    def tables(self, title: str) -> list[list[dict[str, str]]]:
        """For a reader: the measures of all images, then those of every class."""
        whole = {
            "images": str(self.images),
            "mean IoU over classes, 95 % interval": f"{percent(asdict(self.miou))} %",
            "mean Dice over classes, 95 % interval": f"{percent(asdict(self.mdice))} %",
            "Dice, mean over images, 95 % interval": f"{percent(asdict(self.dice))} %",
            "pixels that are right": f"{100 * self.accuracy:.1f} %",
        }
        pixels = [sum(row) for row in self.confusion]
        classes = zip(self.class_names, pixels, self.iou_by_class, self.dice_by_class, strict=True)
        return [
            [{title: key, "": value} for key, value in whole.items()],
            [
                {"class": name, "pixels": str(n), "IoU": _told(iou), "Dice": _told(dice)}
                for name, n, iou, dice in classes
            ],
        ]


def _told(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def confusion_of(predicted: np.ndarray, truth: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """Pixels of one image by true class (row) and predicted class, [classes, classes]; `ignore` is in neither.

    Args:
        predicted, truth: class numbers, [H, W].

    Raises:
        DataError: the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise DataError(f"got a prediction {predicted.shape} and a truth {truth.shape}; expected [H, W] for both")
    counted = truth != ignore
    places = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def by_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and Dice of every class, [..., classes] each; NaN for a class that the truth has not.

    Args:
        confusion: pixels by true and predicted class, [..., classes, classes].
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, painted = confusion.sum(-1), confusion.sum(-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, dice = hits / (true + painted - hits), 2 * hits / (true + painted)
    return np.where(true > 0, iou, np.nan), np.where(true > 0, dice, np.nan)


def dice_of_image(confusion: np.ndarray) -> float:
    """Mean Dice over the classes of one image's mask; 1 where no pixel counts."""
    dice = by_class(confusion)[1]
    return float(np.nanmean(dice)) if not np.isnan(dice).all() else 1.0


def report(confusions: Sequence[np.ndarray], class_names: tuple[str, ...]) -> SemanticReport:
    """All measures of the images' counts; DataError where there is no image."""
    if not confusions:
        raise DataError("there are no predictions to measure")
    stacked = np.stack(confusions)
    total = stacked.sum(0)
    iou, dice = by_class(total)
    drawn = np.random.default_rng(0).multinomial(len(stacked), np.full(len(stacked), 1 / len(stacked)), size=SAMPLES)
    resampled = [_means(values) for values in by_class(np.tensordot(drawn, stacked, axes=1))]
    return SemanticReport(
        images=len(stacked),
        miou=_interval(float(_means(iou)), resampled[0]),
        mdice=_interval(float(_means(dice)), resampled[1]),
        dice=bootstrap(np.array([dice_of_image(one) for one in stacked])),
        accuracy=float(np.trace(total) / max(1, total.sum())),
        class_names=class_names,
        iou_by_class=tuple(None if np.isnan(value) else float(value) for value in iou),
        dice_by_class=tuple(None if np.isnan(value) else float(value) for value in dice),
        confusion=tuple(tuple(int(n) for n in row) for row in total),
    )


def _means(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that are there, of [..., classes]; 0 where none is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(-1) / np.maximum(known.sum(-1), 1)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))
