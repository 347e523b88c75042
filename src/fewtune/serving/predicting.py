"""All tasks of a folder on all images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewtune.data.images import image_files, open_image, readable
from fewtune.errors import DataError, Progress
from fewtune.progress import shown
from fewtune.serving.bank import Prediction
from fewtune.serving.opening import OpenedBank, open_bank
from fewtune.training.loaders import pick_device

COLUMNS = ("file", "task", "prediction", "probability", "probabilities")


def predict_tasks(
    tasks: str | Path,
    images: Iterable[str | Path],
    *,
    backbone: str | None = None,
    batch_size: int = 32,
    accelerator: str = "auto",
    progress: Progress | None = None,
    strict: bool = True,
) -> list[dict[str, Any]]:
    """One row for every image and task: file, task, prediction, its probability, and each class's probability.

    Of a task of images of several classes, `prediction` is all that the image has, parted by ";", and `probability`
    that of the most probable class.

    Args:
        tasks: a folder of task files.
        images: image files, and folders that are searched for images.
        backbone: left out, the task files name it.
        batch_size: images of a forward pass, counted once for each task.
        strict: refuse all where one image cannot be read. Else it has one row at the end, which says why in the column
            `error`, and the others are predicted.

    Raises:
        DataError: a path is missing or unreadable, or there is no image or no task.
    """
    given = image_files(images)
    files, faults = (given, {}) if strict else readable(given)
    opened = open_bank(tasks, backbone, device=pick_device(accelerator), progress=progress)
    names = opened.bank.tasks()
    if not names:
        raise DataError(f"{tasks} holds no task of this backbone")
    rows: list[dict[str, Any]] = []
    step = max(1, batch_size // len(names))
    for start in shown(range(0, len(files), step), "predict", -(-len(files) // step)):
        some = [(str(file), open_image(file)) for file in files[start : start + step]]
        asked = [(file, name, opened.prepare(name, image)) for file, image in some for name in names]
        answers = _answers(opened, [name for _, name, _ in asked], [image for *_, image in asked])
        rows += [_row(file, answer) for (file, _, _), answer in zip(asked, answers, strict=True)]
    if faults:
        wrong = [dict.fromkeys(COLUMNS) | {"file": str(file), "error": text} for file, text in faults.items()]
        rows = [*({**row, "error": None} for row in rows), *wrong]
    return rows


def _answers(opened: OpenedBank, names: list[str], images: list[Tensor]) -> list[Prediction]:
    """One an image; images of one size share a pass."""
    by_size: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    answers: dict[int, Prediction] = {}
    for places in by_size.values():
        batch = torch.stack([images[i] for i in places]).to(opened.device)
        answers |= zip(places, opened.bank.predict(batch, [names[i] for i in places]), strict=True)
    return [answers[i] for i in range(len(images))]


def _row(file: str, answer: Prediction) -> dict[str, Any]:
    by_class = {name: round(p, 6) for name, p in answer.probabilities.items()}
    told = (file, answer.task, ";".join(answer.labels), round(answer.probability, 6), by_class)
    return dict(zip(COLUMNS, told, strict=True))
