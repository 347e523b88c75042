"""A task file with its backbone: all that evaluating, predicting and exporting need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewtune.data.transforms import eval_transform
from fewtune.delta import Delta, applied
from fewtune.delta.levels import flatten, shared_of
from fewtune.errors import DeltaError, Progress
from fewtune.methods import TaskFile, Tuner, load_task_file, put_in, require_in_place
from fewtune.models import Backbone, as_described, backbone_from_description, channels_last
from fewtune.quantised import dequantised_state


@dataclass(frozen=True)
class LoadedClassifier:
    """A backbone with a task in it.

    `plain` is what another task can be loaded into: `backbone`, or, where the method adds modules, what these stand
    beside. `tuner` is that of such a method, else None.
    """

    delta: TaskFile
    backbone: Backbone
    class_names: tuple[str, ...]
    transform: Callable[[Any], Any]
    plain: Backbone
    tuner: Tuner | None = None

    def require_in_place(self) -> None:
        """DeltaError where another task was loaded into the same backbone since."""
        require_in_place(self.delta, self.plain.model)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's state, which its library loads strictly; where modules were added, they are merged, and
        quantised weights are in it as the float numbers that they stand for.

        Raises:
            TuningError: the method's modules cannot be merged.
        """
        state = self.backbone.model.state_dict() if self.tuner is None else self.tuner.merged_state_dict()
        return dequantised_state(state)


def load_classifier(
    path: str | Path,
    progress: Progress | None = None,
    backbone: Backbone | None = None,
    kind: str = "classification",
) -> LoadedClassifier:
    """Make the backbone that a task file names and apply the file to it.

    Args:
        backbone: the backbone, loaded already, with a head of any size; the task that is in it is taken out first.
        kind: of task that the file must be of.

    Raises:
        DeltaError: the file is missing or damaged, names no backbone, or was made for another one.
        ModelError: the backbone cannot be had.
    """
    delta = load_task_file(path)
    lacking = [key for key in ("backbone", "class_names") if key not in delta.metadata]
    if lacking:
        raise DeltaError(
            f"{path} does not say its {' and '.join(lacking)}; it was saved without metadata, so apply it in Python "
            "to the model that it was made for"
        )
    if (stated := delta.metadata.get("task", "classification")) != kind:
        raise DeltaError(f"{path} is of a {stated} run, expected one of {kind}")
    class_names = tuple(str(name) for name in delta.metadata["class_names"])
    described = delta.metadata["backbone"]
    if backbone is None:
        plain = backbone_from_description(described, len(class_names), progress)
    else:
        plain = as_described(backbone, described, len(class_names))
    shared = shared_of(delta.metadata, path)
    if shared is not None and isinstance(delta, Delta):
        if (present := applied(plain.model)) is not None:
            present.revert(plain.model)
        delta = flatten(plain.model, shared, delta)
    model, tuner = put_in(delta, channels_last(plain.model))
    transform = eval_transform(delta.metadata.get("transform", "none"), plain)
    return LoadedClassifier(delta, replace(plain, model=model.eval()), class_names, transform, plain, tuner)
