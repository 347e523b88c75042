"""Accuracy and its kin of a classifier.

Every measure is computed once, from the probabilities of all test images, so that nothing depends on batches.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_precision,
    multiclass_recall,
)

from fewtune.errors import DataError
from fewtune.metrics import Interval, percent, wilson

CALIBRATION_BINS = 15


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

    def tables(self, title: str) -> list[list[dict[str, str]]]:
        """For a reader: the measures of all images, then those of every class."""
        whole = {
            "images": str(self.images),
            "accuracy, 95 % interval (Wilson)": f"{percent(asdict(self.accuracy))} %",
            "balanced accuracy": f"{100 * self.balanced_accuracy:.1f} %",
            "expected calibration error": f"{100 * self.calibration_error:.1f} %",
        }
        classes = zip(self.class_names, self.support, self.precision, self.recall, self.confusion, strict=True)
        return [
            [{title: key, "": value} for key, value in whole.items()],
            [
                {"class": name, "images": str(n), "precision": f"{p:.3f}", "recall": f"{r:.3f}",
                 "predicted as each class": " ".join(map(str, row))}
                for name, n, p, r, row in classes
            ],
        ]  # fmt: skip


def report(probabilities: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Report:
    """All measures of `probabilities` [N, C] against `labels` [N].

    The accuracy's interval is Wilson's.
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
        accuracy=wilson((predicted == labels).numpy()),
        balanced_accuracy=float(recall[support > 0].mean()),
        calibration_error=float(calibration),
        class_names=class_names,
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        support=tuple(support.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )
