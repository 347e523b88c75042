"""Predict images with nothing but a task file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fewtune.data import Split
from fewtune.data.images import find_images
from fewtune.errors import DataError
from fewtune.training.loaders import image_loader
from fewtune.training.probabilities import pick_device, prediction_rows, probabilities
from fewtune.training.task import load_task


def predict(
    delta: str | Path,
    images: Iterable[str | Path],
    *,
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for every image: file, prediction, its probability, and each class's probability.

    Args:
        delta: the task file; its backbone, input size, normalisation and class names are read from it.
        images: image files, and folders that are searched for images.

    Raises:
        DataError: a path is missing or unreadable, or there is no image.
    """
    files = image_files(images)
    task = load_task(delta, progress)
    split = Split(records=files, labels=[0] * len(files), names=[str(file) for file in files])
    loader = image_loader(split.with_transform(task.transform), batch_size, workers=workers)
    found, _ = probabilities(task.backbone.model, loader, pick_device(accelerator), "predict")
    return prediction_rows(split.names, found, task.class_names)


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files among `paths`, and all images in the folders among them, each folder sorted; hidden files aside."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(find_images(path))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder at {path}")
    if not found:
        raise DataError("no images were found in what was given; expected image files, or folders that hold some")
    return found
