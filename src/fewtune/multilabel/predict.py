"""Predict images of any number of classes with nothing but a task file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewtune.classification.loaded import LoadedClassifier, load_classifier
from fewtune.classification.predict import predicted_with, probabilities
from fewtune.data import Split
from fewtune.errors import Progress
from fewtune.multilabel.metrics import THRESHOLD, f1_of_images
from fewtune.training.loaders import image_loader
from fewtune.training.task import Answer

KIND = "multi-label"
SEPARATOR = ";"


def load(path: str | Path, progress: Progress | None = None, backbone: Any = None) -> LoadedClassifier:
    """A task file with its backbone; see `fewtune.classification.loaded.load_classifier`."""
    return load_classifier(path, progress, backbone, KIND)


def thresholds_of(metadata: Mapping[str, Any], classes: int) -> tuple[float, ...]:
    """The probability from which each class is predicted, as the task file records it."""
    return tuple(map(float, metadata.get("thresholds") or [THRESHOLD] * classes))


def answer(logits: Tensor, class_names: Sequence[str], metadata: Mapping[str, Any]) -> Answer:
    """What one image's logits [C] say: the classes from their thresholds on, the most probable first."""
    scores = logits.float().sigmoid().tolist()
    by_class = dict(zip(class_names, scores, strict=True))
    thresholds = thresholds_of(metadata, len(class_names))
    held = [name for name, p, least in zip(class_names, scores, thresholds, strict=True) if p >= least]
    return Answer(tuple(sorted(held, key=lambda name: -by_class[name])), by_class)


def predict(
    delta: str | Path | LoadedClassifier,
    images: Iterable[str | Path],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    accelerator: str = "auto",
    progress: Progress | None = None,
    strict: bool = True,
) -> list[dict[str, Any]]:
    """One row for every image: file, the predicted classes parted by ";", and each class's probability.

    The arguments and errors are those of `fewtune.classification.predict.predict`.
    """

    def rows(split: Split, device: torch.device) -> list[dict[str, Any]]:
        task = delta if isinstance(delta, LoadedClassifier) else load(delta, progress)
        task.require_in_place()
        loader = image_loader(split.with_transform(task.transform), batch_size, workers=workers)
        scores, _ = probabilities(task.backbone.model, loader, device, "predict", torch.sigmoid)
        return prediction_rows(
            split.names, scores, task.class_names, thresholds_of(task.delta.metadata, scores.shape[1])
        )

    return predicted_with(rows, images, accelerator, strict=strict)


def prediction_rows(
    names: Sequence[str],
    scores: Tensor,
    class_names: Sequence[str],
    thresholds: Sequence[float],
    labels: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One row an image: file, its classes where they are known, the predicted classes, with known ones the F1 of both,
    then each class's probability.

    Args:
        scores: [N, C].
        labels: 0 and 1, [N, C].
    """
    predicted = scores >= torch.tensor(thresholds, dtype=scores.dtype)
    f1 = None if labels is None else f1_of_images(predicted.long(), labels.long())
    rows = []
    for i, (name, row) in enumerate(zip(names, scores, strict=True)):
        known = {} if labels is None else {"labels": _joined(class_names, labels[i])}
        rounded = {} if f1 is None else {"f1": round(float(f1[i]), 6)}
        each = {f"p({label})": round(float(p), 6) for label, p in zip(class_names, row, strict=True)}
        rows.append({"file": str(name), **known, "predictions": _joined(class_names, predicted[i]), **rounded, **each})
    return rows


def _joined(class_names: Sequence[str], held: Tensor) -> str:
    return SEPARATOR.join(name for name, here in zip(class_names, held.tolist(), strict=True) if here)
