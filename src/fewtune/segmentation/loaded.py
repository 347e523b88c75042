"""A task file of segmentation with its segmenter: all that evaluating and predicting need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fewtune.errors import DeltaError, Progress
from fewtune.methods import TaskFile, Tuner, load_task_file, put_in, require_in_place
from fewtune.quantised import dequantised_state
from fewtune.segmentation.models import Segmenter, as_described, segmenter_from_description

CLASS_NAMES = ("background", "object")


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter to which a task file has been applied.

    `plain` is what another task can be loaded into: `segmenter`, or, where the method adds modules, what these stand
    beside. `tuner` is that of such a method, else None.
    """

    delta: TaskFile
    segmenter: Segmenter
    plain: Segmenter
    tuner: Tuner | None = None

    def require_in_place(self) -> None:
        """DeltaError where another task was loaded into the same segmenter since."""
        require_in_place(self.delta, self.plain.model)

    @property
    def backbone(self) -> Segmenter:
        """The segmenter, by the name that all kinds of tasks share."""
        return self.segmenter

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The state of the tuned segmenter's model, in float numbers, without added modules: these are merged.

        Raises:
            TuningError: the method's modules cannot be merged.
        """
        state = self.segmenter.model.state_dict() if self.tuner is None else self.tuner.merged_state_dict()
        return dequantised_state(state)


def load_tuned_segmenter(
    path: str | Path,
    progress: Progress | None = None,
    segmenter: Segmenter | None = None,
    kind: str = "segmentation",
) -> LoadedSegmenter:
    """Make the segmenter that a task file names and apply the file to it.

    Args:
        segmenter: the segmenter, loaded already; the task that is in it is taken out first.
        kind: of task that the file must be of.

    Raises:
        DeltaError: the file is missing or damaged, is of a classification run, or was made for another segmenter.
        ModelError: the segmenter cannot be had.
    """
    delta = load_task_file(path)
    if delta.metadata.get("task") != kind or "backbone" not in delta.metadata:
        raise DeltaError(f"{path} is no task file of a {kind} run; it does not name a segmenter")
    described = delta.metadata["backbone"]
    if segmenter is None:
        plain = segmenter_from_description(described, progress)
    else:
        plain = as_described(segmenter, described)
    model, tuner = put_in(delta, plain.model)
    return LoadedSegmenter(delta, replace(plain, model=model.eval()), plain, tuner)
