"""All tasks of a folder on all images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fewtune.data.images import image_files, open_image
from fewtune.errors import DataError
from fewtune.progress import shown
from fewtune.serving.opening import open_bank
from fewtune.training.loaders import pick_device


def predict_tasks(
    tasks: str | Path,
    images: Iterable[str | Path],
    *,
    backbone: str | None = None,
    batch_size: int = 32,
    accelerator: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for every image and task: file, task, prediction, its probability, and each class's probability.

    Args:
        tasks: a folder of task files.
        images: image files, and folders that are searched for images.
        backbone: left out, the task files name it.
        batch_size: images of a forward pass, counted once for each task.

    Raises:
        DataError: a path is missing or unreadable, or there is no image or no task.
    """
    files = image_files(images)
    opened = open_bank(tasks, backbone, device=pick_device(accelerator), progress=progress)
    names = opened.bank.tasks()
    if not names:
        raise DataError(f"{tasks} holds no task of this backbone")
    rows: list[dict[str, Any]] = []
    step = max(1, batch_size // len(names))
    for start in shown(range(0, len(files), step), "predict", -(-len(files) // step)):
        some = [(str(file), open_image(file)) for file in files[start : start + step]]
        asked = [(file, image, name) for file, image in some for name in names]
        batch = torch.stack([opened.prepare(name, image) for _, image, name in asked]).to(opened.device)
        for (file, _, name), answer in zip(asked, opened.bank.predict(batch, [n for *_, n in asked]), strict=True):
            row = {
                "file": file,
                "task": name,
                "prediction": ";".join(answer.labels),
                "probability": round(answer.probability, 6),
            }
            rows.append({**row, "probabilities": {c: round(p, 6) for c, p in answer.probabilities.items()}})
    return rows
