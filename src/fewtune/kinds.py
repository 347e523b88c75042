"""The kinds of tasks by name, and what each asks of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fewtune.plugins import Deferred, Table

if TYPE_CHECKING:  # the rooms above that the table names, imported when they are asked for
    from fewtune import classification, multilabel, segmentation, semantic  # noqa: F401

DEFAULT = "classification"
"""The kind of recipes and files that name none."""


@dataclass(frozen=True)
class Rules:
    """What a kind of task asks of a recipe.

    objectives: what connections may be scored by; the first where a recipe names none.
    augments: the values of `augment` that it has; None for all.
    without: settings that mean nothing for it, so that a recipe with one of them is refused.
    because: why, for the message.
    peers: the folder within recipes/peers of the settings that take a recipe's place where its method is changed.
    one_label: whether every image has one of several classes, so that a linear classifier of the features is a model.
    """

    objectives: tuple[str, ...] = ("supcon", "cross_entropy")
    augments: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    because: str = "they mean nothing for it"
    peers: str = ""
    one_label: bool = False


ONE_CLASS_ONLY = (
    "shots", "ood", "label_smoothing", "mixup", "cutmix", "class_weights", "head_init", "regularisation", "consistency",
)  # fmt: skip
"""Settings that mean something only where each image has one class."""

MASK_RULES = Rules(
    objectives=("segmentation",),
    augments=("plain", "flip"),
    without=(*ONE_CLASS_ONLY, "cache", "keep_prefix"),
    because="its images have no class",
    peers="segmentation",
)
"""Of the kinds of task whose labels are masks."""


class Kind(Protocol):
    """A kind of task, as recipes see it; `fewtune.training.task.Task` is all of it."""

    @property
    def name(self) -> str:
        """As recipes and task files say it."""

    @property
    def rules(self) -> Rules:
        """What it asks of a recipe."""


KINDS: Table[Kind] = Table(
    "fewtune.tasks",
    "task",
    deferred={
        "classification": Deferred("fewtune.classification:CLASSIFICATION"),
        "multi-label": Deferred("fewtune.multilabel:MULTI_LABEL"),
        "segmentation": Deferred("fewtune.segmentation:SEGMENTATION"),
        "semantic-segmentation": Deferred("fewtune.semantic:SEMANTIC"),
    },
)
"""Kind of task by name; `fewtune.tasks.TASKS` is this table. Installed packages add theirs as entry points."""
