"""A task file of segmentation with its segmenter: all that evaluating and predicting need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewtune.errors import DeltaError, Progress
from fewtune.methods import TaskFile, Tuner, load_task_file
from fewtune.segmentation.models import Segmenter, segmenter_from_description

CLASS_NAMES = ("background", "object")


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter to which a task file has been applied.

    `tuner` is that of a method which adds modules to the model; None where the segmenter stays a plain model.
    """

    delta: TaskFile
    segmenter: Segmenter
    tuner: Tuner | None = None

    @property
    def backbone(self) -> Segmenter:
        """The segmenter, by the name that all kinds of tasks share."""
        return self.segmenter

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The state of the tuned segmenter's model, without added modules: these are merged.

        Raises:
            TuningError: the method's modules cannot be merged.
        """
        return self.segmenter.model.state_dict() if self.tuner is None else self.tuner.merged_state_dict()


def load_tuned_segmenter(path: str | Path, progress: Progress | None = None) -> LoadedSegmenter:
    """Make the segmenter that a task file names and apply the file to it.

    Raises:
        DeltaError: the file is missing or damaged, is of a classification run, or was made for another segmenter.
        ModelError: the segmenter cannot be had.
    """
    delta = load_task_file(path)
    if delta.metadata.get("task") != "segmentation" or "backbone" not in delta.metadata:
        raise DeltaError(f"{path} is no task file of a segmentation run; it does not name a segmenter")
    segmenter = segmenter_from_description(delta.metadata["backbone"], progress)
    tuner = delta.apply(segmenter.model)
    segmenter.model.eval()
    return LoadedSegmenter(delta, segmenter, tuner)
