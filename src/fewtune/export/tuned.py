"""A task as one plain model, with all that whoever runs it must know, and the check of what was made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewtune.classification.checkpoints import untrained
from fewtune.classification.loaded import LoadedClassifier
from fewtune.data.mask_transforms import Input
from fewtune.errors import ExportError, Progress, TuningError
from fewtune.models import backbone_from_description, logits
from fewtune.quantised import is_quantised
from fewtune.segmentation.loaded import LoadedSegmenter
from fewtune.segmentation.models import segmenter_from_description
from fewtune.tasks import load_task

BATCHES = (1, 7)
"""Batch sizes of the check."""
TOLERANCE = 1e-4
"""Of the logits, relative to the largest where that is over 1."""

CLASSES = "one logit a class"
MASK = (
    "the logits of a mask, one channel or one a class, at the model's own resolution; resize them to the image's size, "
    "then take the sigmoid of one channel or the largest of several"
)

Run = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S], as the task's transform gives them, to logits [B, C]; of masks [B, 1, h, w]."""


class Logits(nn.Module):
    """A model whose output is the tensor of logits, whatever its library wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.model(images))


@dataclass(frozen=True)
class Tuned:
    """A task ready to be exported.

    model: the plain model with the task in it; it has the method's modules only where they cannot be merged.
    merged: whether it is plain.
    transform: PIL RGB image -> tensor [3, S, S], as the task prepares it.
    square: whether an image is resized to a square; else its shorter side is resized and the centre cropped.
    crop_pct: what its shorter side is resized by: to S / crop_pct.
    outputs: what the logits mean.
    """

    task: LoadedClassifier | LoadedSegmenter
    model: nn.Module
    merged: bool
    transform: Callable[[Image.Image], Tensor]
    square: bool
    crop_pct: float
    outputs: str

    @property
    def image_size(self) -> int:
        return self.task.backbone.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, self.task.delta.metadata["class_names"]))

    @property
    def draws_masks(self) -> bool:
        return isinstance(self.task, LoadedSegmenter)

    def inputs(self) -> dict[str, Any]:
        """What must be done to an image, and what the outputs mean; JSON values by name."""
        backbone = self.task.backbone
        return {
            "class_names": list(self.class_names),
            "image_size": backbone.image_size,
            "resize": "square" if self.square else "shorter side, then centre crop",
            "crop_pct": 1.0 if self.square else self.crop_pct,
            "interpolation": backbone.interpolation,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "channels": "RGB, pixels / 255",
            "task": self.task.delta.metadata.get("task", "classification"),
            "outputs": self.outputs,
            "backbone": backbone.source,
            "method": self.task.delta.metadata.get("method", ""),
            "fewtune": version("fewtune"),
        }

    def metadata(self) -> dict[str, str]:
        """`inputs` as strings: text as it is, all else as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in self.inputs().items()
        }

    def images(self, count: int) -> Tensor:
        """Noise [count, 3, S, S] that has gone through the task's transform, as `predict` does it."""
        rng = np.random.default_rng(count)
        size = self.image_size + 16
        noise = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        return torch.stack([self.transform(Image.fromarray(pixels)) for pixels in noise])

    @torch.inference_mode()
    def check(self, run: Run, what: str) -> float:
        """The largest difference of an exported model's logits from the task's own, over `BATCHES`.

        Raises:
            ExportError: it is over `TOLERANCE`, or the exported model cannot take one of the batches.
        """
        largest = 0.0
        for size in BATCHES:
            images = self.images(size)
            wanted = logits(self.task.backbone.model(images))
            got = run(images)
            difference = float((got - wanted).abs().max()) if got.shape == wanted.shape else float("nan")
            difference /= max(1.0, float(wanted.abs().max()))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{what} does not predict what the task does: its logits of {size} images differ by "
                    f"{difference:.2g}, at most {TOLERANCE:g} was expected; nothing was written"
                )
            largest = max(largest, difference)
        return largest


def tuned(file: Path, progress: Progress | None = None) -> Tuned:
    """Load a task file's model, with the method's modules merged into its weights where that can be.

    Raises:
        DeltaError: the file is missing or damaged, or says nothing of its backbone.
        ModelError: the backbone cannot be had.
        ExportError: it is of a kind of task that is not exported.
    """
    task = load_task(file, progress)
    match task:
        case LoadedClassifier():
            square = task.delta.metadata.get("transform", "none") in ("plain", "flip")
            read: Any = (task.transform, square, task.backbone.crop_pct, CLASSES)
        case LoadedSegmenter():
            prepared = Input(task.backbone)
            read = (lambda image: prepared(image)[0], True, 1.0, MASK)
        case _:
            raise ExportError(f"{file} is of a kind of task that is not exported; export classifiers and segmenters")
    if task.tuner is None and not any(map(is_quantised, task.backbone.model.parameters())):
        return Tuned(task, task.backbone.model, True, *read)
    try:
        state = task.plain_state_dict()
    except TuningError:
        return Tuned(task, task.backbone.model, False, *read)
    model = _untuned(task)
    model.load_state_dict(state)
    return Tuned(task, model.eval(), True, *read)


def _untuned(task: LoadedClassifier | LoadedSegmenter) -> nn.Module:
    """A fresh model of the same architecture, whose weights are of no account."""
    description = untrained(task.backbone.describe())
    if isinstance(task, LoadedSegmenter):
        return segmenter_from_description(description).model
    return backbone_from_description(description, len(task.class_names)).model
