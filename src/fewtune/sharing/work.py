"""The two kinds of runs of `fewtune fit-many`: all tasks together, and one task on the frozen shared part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.classification.learner import Classifier
from fewtune.classification.work import ImageWork, fresh_backbone
from fewtune.config import Recipe
from fewtune.data import ImageData, Split
from fewtune.delta import Delta
from fewtune.delta.levels import merge_shared
from fewtune.methods import Tuner
from fewtune.training.learner import Learner


def joined(named: dict[str, ImageData]) -> ImageData:
    """The training and validation images of all tasks; classes are those of the first task, then of the second, …"""
    names: list[str] = []
    parts: dict[str, list[Split]] = {"train": [], "val": []}
    for task, data in named.items():
        for split in parts:
            present = data.splits[split]
            shifted = [len(names) + label for label in present.labels]
            parts[split].append(replace(present, labels=shifted, names=[f"{task}/{name}" for name in present.names]))
        names += [f"{task}/{name}" for name in data.class_names]
    together = {split: _all(some) for split, some in parts.items()}
    return ImageData("+".join(named), tuple(names), **together)


def _all(splits: Sequence[Split]) -> Split:
    first, *others = splits
    for other in others:
        first = first.joined(other)
    return first


class JointClassifier(Classifier):
    """Every image is judged among the classes of its own task: one head of all classes, of which each task has a part.

    Args:
        sizes: number of classes of each task.
    """

    def __init__(self, *arguments: Any, sizes: Sequence[int]) -> None:
        super().__init__(*arguments)
        task = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.register_buffer("foreign", task[:, None] != task[None, :], persistent=False)
        self.foreign: Tensor
        """[C, C], true where the column's class is of another task than the row's."""

    def _among_own(self, images: Tensor, labels: Tensor) -> Tensor:
        return self(images).float().masked_fill(self.foreign[labels], -torch.inf)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy among the classes of each image's task, a scalar."""
        scores = self._among_own(images, labels)
        smoothing = self.recipe.label_smoothing
        plain = F.cross_entropy(scores, labels, weight=self.class_weights)
        if not smoothing:
            return plain
        among = ~self.foreign[labels]
        even = -(scores.log_softmax(1).masked_fill(~among, 0).sum(1) / among.sum(1)).mean()
        return (1 - smoothing) * plain + smoothing * even

    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and 1 where the class is right among those of the task, [B] each."""
        scores = self._among_own(images, labels)
        return F.cross_entropy(scores, labels, reduction="none"), (scores.argmax(1) == labels).float()


@dataclass(frozen=True)
class JointWork(ImageWork):
    """All tasks together; there is no test, which is each task's own."""

    sizes: tuple[int, ...] = field(kw_only=True)

    @classmethod
    def of(cls, recipe: Recipe, named: dict[str, ImageData]) -> JointWork:
        """The images of some tasks, and a fresh backbone with a head of all their classes."""
        data = joined(named)
        sizes = tuple(part.num_classes for part in named.values())
        return cls(recipe, data, fresh_backbone(recipe, data), sizes=sizes)

    def learner(self, attach: Callable[[Learner], Tuner]) -> JointClassifier:
        """Judges on the validation images of all tasks, every image counted once."""
        assert self.data.val is not None
        model, val = self.backbone.model, self.evaluated(self.data.val)
        return JointClassifier(
            model, self.recipe, self.train, val, self.data.num_classes, attach, sizes=self.sizes
        )  # fmt: skip


@dataclass(frozen=True)
class OwnWork(ImageWork):
    """One task on a backbone in which the shared part stands and is frozen."""

    shared: Delta = field(kw_only=True)
    noted: dict[str, Any] = field(kw_only=True)
    """What the task file says of its shared part."""

    @classmethod
    def of(cls, work: ImageWork, shared: Delta, noted: dict[str, Any]) -> Self:
        """The same work, with the shared part written into its model."""
        merge_shared(work.backbone.model, shared)
        return cls(**{one.name: getattr(work, one.name) for one in fields(work)}, shared=shared, noted=noted)

    def renewed(self, recipe: Recipe) -> OwnWork:
        """The same images with another fresh backbone, the shared part in it."""
        fresh = replace(self, recipe=recipe, backbone=fresh_backbone(recipe, self.data))
        merge_shared(fresh.backbone.model, self.shared)
        return fresh

    def describe(self, **more: Any) -> dict[str, Any]:
        """The metadata of a task file, which names the shared part."""
        return super().describe(**more, **self.noted)
