"""Predict images with nothing but a task file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewtune.classification.loaded import LoadedClassifier, load_classifier
from fewtune.data import Split
from fewtune.data.images import image_files, readable, with_faults
from fewtune.errors import DataError, Progress
from fewtune.models import channels_last, logits
from fewtune.progress import shown
from fewtune.training.loaders import image_loader, pick_device


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
    """One row for every image: file, prediction, its probability, and each class's probability.

    Args:
        delta: the task file; its backbone, input size, normalisation and class names are read from it. Or the task
            that was loaded from it.
        images: image files, and folders that are searched for images.
        workers: processes that decode images; left out, one a core where there are many images.
        strict: refuse all where one image cannot be read. Else its row says why in the column `error`, which is there
            only then, and the others are predicted.

    Raises:
        DataError: a path is missing, or unreadable (`strict`), or there is no image.
        DeltaError: the task file is not good, or another task was put into the loaded one's backbone since.
    """

    def answer(split: Split, device: torch.device) -> list[dict[str, Any]]:
        task = delta if isinstance(delta, LoadedClassifier) else load_classifier(delta, progress)
        task.require_in_place()
        loader = image_loader(split.with_transform(task.transform), batch_size, workers=workers)
        shares, _ = probabilities(task.backbone.model, loader, device, "predict")
        return prediction_rows(split.names, shares, task.class_names)

    return predicted_with(answer, images, accelerator, strict=strict)


def predicted_with(
    answer: Callable[[Split, torch.device], list[dict[str, Any]]],
    images: Iterable[str | Path],
    accelerator: str,
    *,
    strict: bool,
) -> list[dict[str, Any]]:
    """One row for every image: what `answer` says of the readable ones.

    Which these are is asked only where one could not be read, since it takes decoding all of them once more.
    """
    given, device = image_files(images), pick_device(accelerator)
    try:
        return answer(_split(given), device)
    except DataError:
        files, faults = ([], {}) if strict else readable(given)
        if not faults:
            raise
    return with_faults(answer(_split(files), device) if files else [], given, faults)


def _split(files: Sequence[Path]) -> Split:
    return Split(records=files, labels=[0] * len(files), names=[str(file) for file in files])


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


@torch.inference_mode()
def probabilities(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    text: str,
    of_logits: Callable[[Tensor], Tensor] = _softmax,
) -> tuple[Tensor, Tensor]:
    """Probabilities [N, C] (float32, on the CPU) and labels [N, …] of a loader's images, in its order."""
    channels_last(model.eval().to(device))
    outputs, labels = [], []
    for images, wanted, _ in shown(loader, text, len(loader)):
        outputs.append(of_logits(logits(model(images.to(device))).float()).cpu())
        labels.append(wanted)
    return torch.cat(outputs), torch.cat(labels)


def prediction_rows(
    names: Sequence[str], probabilities: Tensor, class_names: Sequence[str], labels: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row an image: file, label where it is known, prediction, its probability, then each class's."""
    rows = []
    columns = [f"p({label})" for label in class_names]
    for i, (name, row, best) in enumerate(
        zip(names, probabilities.tolist(), probabilities.argmax(1).tolist(), strict=True)
    ):
        known = {} if labels is None else {"label": class_names[labels[i]]}
        each = dict(zip(columns, (round(p, 6) for p in row), strict=True))
        probability = round(row[best], 6)
        rows.append({"file": str(name), **known, "prediction": class_names[best], "probability": probability, **each})
    return rows
