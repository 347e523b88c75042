"""A task file of segmentation with its segmenter: all that evaluating and predicting need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewtune.errors import DeltaError
from fewtune.methods import TaskFile, Tuner, load_task_file
from fewtune.segmentation.models import Segmenter, segmenter_from_description

CLASS_NAMES = ("background", "object")


@dataclass(frozen=True)
class MaskTask:
    """A segmenter to which a task file has been applied.

    `tuner` is that of a method which adds modules to the model; None where the segmenter stays a plain model.
    """

    delta: TaskFile
    segmenter: Segmenter
    tuner: Tuner | None = None

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The state of the tuned segmenter's model, without added modules: these are merged.

        Raises:
            TuningError: the method's modules cannot be merged.
        """
        return self.segmenter.model.state_dict() if self.tuner is None else self.tuner.merged_state_dict()


def is_mask_task(metadata: dict[str, Any]) -> bool:
    """Whether a task file's metadata are those of a segmentation run."""
    return metadata.get("task") == "segmentation"


def load_mask_task(path: str | Path, progress: Callable[[str], None] | None = None) -> MaskTask:
    """Make the segmenter that a task file names and apply the file to it.

    Raises:
        DeltaError: the file is missing or damaged, is of a classification run, or was made for another segmenter.
        ModelError: the segmenter cannot be had.
    """
    delta = load_task_file(path)
    if not is_mask_task(delta.metadata) or "backbone" not in delta.metadata:
        raise DeltaError(f"{path} is no task file of a segmentation run; it does not name a segmenter")
    segmenter = segmenter_from_description(delta.metadata["backbone"], progress)
    tuner = delta.apply(segmenter.model)
    segmenter.model.eval()
    return MaskTask(delta, segmenter, tuner)
