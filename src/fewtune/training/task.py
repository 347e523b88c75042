"""A task file with its backbone: all that evaluating, predicting and exporting need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewtune.config import Recipe
from fewtune.data.transforms import eval_transform
from fewtune.delta import Delta, load_delta
from fewtune.errors import DeltaError
from fewtune.models import Backbone, backbone_from_description


@dataclass(frozen=True)
class Task:
    """A backbone to which a delta has been applied."""

    delta: Delta
    backbone: Backbone
    class_names: tuple[str, ...]
    transform: Callable[[Any], Any]


def describe_task(recipe: Recipe, backbone: Backbone, class_names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The metadata that `load_task` needs, and what a reader of the file wants to know of the run."""
    return {
        "backbone": backbone.describe(),
        "class_names": list(class_names),
        "transform": recipe.augment,
        "method": recipe.method,
        "data": recipe.data,
        "recipe": recipe.model_dump(mode="json"),
        **more,
    }


def load_task(path: str | Path, progress: Callable[[str], None] | None = None) -> Task:
    """Make the backbone that a task file names and apply the file to it.

    Raises:
        DeltaError: the file is missing or damaged, names no backbone, or was made for another one.
        ModelError: the backbone cannot be had.
    """
    delta = load_delta(path)
    lacking = [key for key in ("backbone", "class_names") if key not in delta.metadata]
    if lacking:
        raise DeltaError(
            f"{path} does not say its {' and '.join(lacking)}; it was saved without metadata, so apply it in Python "
            "to the model that it was made for"
        )
    class_names = tuple(str(name) for name in delta.metadata["class_names"])
    backbone = backbone_from_description(delta.metadata["backbone"], len(class_names), progress)
    delta.apply(backbone.model)
    return Task(delta, backbone, class_names, eval_transform(delta.metadata.get("transform", "none"), backbone))
