"""A model's probabilities for many images; all that is tested or predicted goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewtune.errors import DataError
from fewtune.models import logits
from fewtune.training.files import csv_text, write_text
from fewtune.training.progress import shown


def pick_device(accelerator: str = "auto") -> torch.device:
    """The device of work in one process: the first GPU where there is one, unless "cpu" is asked for."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if accelerator == "mps" else "cpu")


@torch.inference_mode()
def probabilities(model: nn.Module, loader: DataLoader, device: torch.device, text: str) -> tuple[Tensor, Tensor]:
    """Probabilities [N, C] (float32, on the CPU) and labels [N] of a loader's images, in its order."""
    model.eval().to(device)
    found, labels = [], []
    for images, wanted, _ in shown(loader, text, len(loader)):
        found.append(logits(model(images.to(device))).float().softmax(dim=1).cpu())
        labels.append(wanted)
    return torch.cat(found), torch.cat(labels)


def prediction_rows(
    names: Sequence[str], found: Tensor, class_names: Sequence[str], labels: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row an image: file, label where it is known, prediction, its probability, then each class's."""
    rows = []
    for i, (name, row) in enumerate(zip(names, found, strict=True)):
        best = int(row.argmax())
        own = {} if labels is None else {"label": class_names[labels[i]]}
        each = {f"p({label})": round(float(p), 6) for label, p in zip(class_names, row, strict=True)}
        probability = round(float(row[best]), 6)
        rows.append({"file": str(name), **own, "prediction": class_names[best], "probability": probability, **each})
    return rows


def write_predictions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV."""
    write_text(path, csv_text(rows))


def read_hits(path: str | Path) -> dict[str, float]:
    """File name -> 1 or 0 for right or wrong, from a CSV file of labelled predictions.

    Raises DataError where the file is missing, or has not the columns file, label and prediction.
    """
    import csv

    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"there is no file of predictions at {path}") from None
    if not rows or not {"file", "label", "prediction"} <= set(rows[0]):
        raise DataError(f"{path} must be a CSV file with the columns file, label and prediction, as evaluate writes it")
    return {row["file"]: float(row["label"] == row["prediction"]) for row in rows}


def paired_hits(first: str | Path, second: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two files of predictions on the same images, in the same order; DataError where the images differ."""
    a, b = read_hits(first), read_hits(second)
    if set(a) != set(b):
        only = sorted(set(a) ^ set(b))
        raise DataError(f"{first} and {second} are about different images; {only[0]} and {len(only) - 1} more differ")
    names = sorted(a)
    return np.array([a[name] for name in names]), np.array([b[name] for name in names])
