"""`TaskBank`: many tasks held beside one backbone; a batch may hold images of any of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewtune.delta import Delta
from fewtune.delta.levels import flatten, shared_of
from fewtune.errors import DataError, DeltaError
from fewtune.methods import MethodFile, load_task_file
from fewtune.models import Backbone, logits
from fewtune.serving.changes import HeldTask, tensors_of
from fewtune.serving.holders import holders_of, replaced
from fewtune.serving.inserted import InsertedTask
from fewtune.serving.mixing import Changed, MixedPass, Workspace, changed_modules
from fewtune.serving.probe import MIDDLE, Splits, close, find_splits, random_images
from fewtune.tasks import kind_of

LOG = logging.getLogger(__name__)
BankTask = HeldTask | InsertedTask
PLAIN = HeldTask({}, frozenset(), 0, {})
"""The backbone as it is."""


@dataclass(frozen=True)
class Prediction:
    """Of one image by one task."""

    task: str
    label: str
    """The most probable class."""
    probability: float
    probabilities: Mapping[str, float]
    """By class, in the order of the task file."""
    labels: Mapping[str, float]
    """The classes that the image has, with their probabilities, the most probable first. One, unless the task is of
    any number of classes an image."""


class TaskBank:
    """Tasks of one backbone, added, replaced and removed at any time.

    A batch is answered in one forward pass, whatever tasks its images belong to. Methods may be called from several
    threads; forward passes take turns. The backbone is put into evaluation mode, and its weights are never written to
    but for a moment in `add`, which looks at them through `Delta.apply`, and undoes it bit for bit.

    Args:
        backbone: a model, or a `fewtune.models.Backbone`, with a head of any size: tasks bring their own.
    """

    def __init__(self, backbone: nn.Module | Backbone) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else None
        self.model: nn.Module = (backbone.model if isinstance(backbone, Backbone) else backbone).eval()
        self._holders = holders_of(self.model)
        self._tasks: Mapping[str, BankTask] = {}
        self._pass, self._change = threading.RLock(), threading.Lock()
        self._workspace = Workspace()
        self._splits: dict[tuple[int, ...], Splits] = {}
        self._changed_modules: dict[tuple[tuple[int, ...], frozenset[str]], list[Changed] | str] = {}
        self._mixable: dict[tuple[tuple[int, ...], frozenset[str]], bool] = {}

    def add(self, name: str, file: str | Path | Delta | MethodFile) -> None:
        """Adds a task, or replaces the one of that name once the new one is known to be good.

        Args:
            name: by which images ask for it.
            file: a task file, or what `load_task_file` makes of one.

        Raises:
            DeltaError: it is damaged, belongs to another backbone, or is no task of classification.
        """
        read = load_task_file(file) if isinstance(file, str | Path) else file
        if (kind := kind_of(read.metadata, name)).answer is None:
            raise DeltaError(f"{name} is a task of {kind.name}; a bank holds tasks of classes")
        task: BankTask
        with self._pass:
            if isinstance(read, Delta):
                if (shared := shared_of(read.metadata, file if isinstance(file, str | Path) else name)) is not None:
                    read = flatten(self.model, shared, read)
                read.apply(self.model)  # refused here, if it is of another backbone
                read.revert(self.model)
                task = HeldTask.of(read, tensors_of(self.model))
            else:
                task = InsertedTask.of(read, self.model)
                LOG.info("%s is of %s, which adds modules: it takes a pass of its own", name, read.method.name)
        with self._change:
            self._tasks = {**self._tasks, name: task}

    def remove(self, name: str) -> None:
        """Raises:
        DataError: there is no such task.
        """
        with self._change:
            self.task(name)
            self._tasks = {other: task for other, task in self._tasks.items() if other != name}

    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of their coming."""
        return tuple(self._tasks)

    def held(self) -> Mapping[str, BankTask]:
        """What is held of every task, by name, as it is now: later changes do not show."""
        return self._tasks

    def task(self, name: str) -> BankTask:
        """What is held of a task.

        Raises:
            DataError: there is none of that name.
        """
        tasks = self._tasks
        if name not in tasks:
            raise DataError(f"there is no task {name!r}; there are {', '.join(tasks) or 'none'}")
        return tasks[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of all tasks; the backbone's own are not counted."""
        return sum(task.nbytes for task in self._tasks.values())

    def predict(self, images: Tensor, tasks: str | Sequence[str], exact: bool = False) -> list[Prediction]:
        """One prediction an image; see `logits`."""
        names = [tasks] * len(images) if isinstance(tasks, str) else list(tasks)
        held = [self.task(name) for name in names]
        return [
            _prediction(name, task, row)
            for name, task, row in zip(names, held, self._answers(images, held, exact), strict=True)
        ]

    def logits(self, images: Tensor, tasks: str | Sequence[str], exact: bool = False) -> list[Tensor]:
        """Of each image its task's logits, [classes of that task].

        Args:
            images: [B, channels, height, width], as the backbone wants them, in its dtype and on its device.
            tasks: the task of every image, or one for all.
            exact: one pass a task with that task's weights, bit for bit what the task applied alone answers; else
                one pass for all, equal to that within rounding.

        Raises:
            DataError: there is no such task, or not one name an image.
        """
        names = [tasks] * len(images) if isinstance(tasks, str) else list(tasks)
        return self._answers(images, [self.task(name) for name in names], exact)

    @torch.inference_mode()
    def _answers(self, images: Tensor, tasks: Sequence[BankTask], exact: bool) -> list[Tensor]:
        if len(tasks) != len(images):
            raise DataError(f"{len(images)} images and {len(tasks)} tasks: expected one task an image")
        of_task: dict[BankTask, list[int]] = {}
        for i, task in enumerate(tasks):
            of_task.setdefault(task, []).append(i)
        answers: dict[int, Tensor] = {}
        with self._pass:
            mixed = [t for t in of_task if not exact and isinstance(t, HeldTask) and self._mixes(t, images)]
            if mixed:
                rows = [i for task in mixed for i in of_task[task]]
                output = self._mixed(_some(images, rows), [(task, len(of_task[task])) for task in mixed])
                answers |= zip(rows, output, strict=True)
            for task, rows in of_task.items():
                if task not in mixed:
                    answers |= zip(rows, self._alone(_some(images, rows), task), strict=True)
        return [answers[i][: task.classes] for i, task in enumerate(tasks)]

    def _alone(self, images: Tensor, task: BankTask) -> Tensor:
        """A pass with copies of the weights that hold the task's values: the numbers of the task applied."""
        if isinstance(task, InsertedTask):
            return logits(task(images))
        with replaced(
            {h: change.written_into(h.tensor) for n, change in task.changes.items() for h in self._holders[n]}
        ):
            return logits(self.model(images))

    def _mixed(self, images: Tensor, rows: Sequence[tuple[HeldTask, int]]) -> Tensor:
        changed = self._changed(images, frozenset().union(*(task.changes for task, _ in rows)))
        assert not isinstance(changed, str)
        return logits(MixedPass(self.model, changed, rows, self._workspace)(images))

    def _changed(self, images: Tensor, names: frozenset[str]) -> list[Changed] | str:
        """The modules to be run once a task where these tensors change, found out once; see `changed_modules`."""
        shape = tuple(images.shape[1:])
        if shape not in self._splits:
            self._splits[shape] = find_splits(self.model, random_images(images))
        if (shape, names) not in self._changed_modules:
            ordered = [name for name in self._holders if name in names]
            self._changed_modules[shape, names] = changed_modules(
                self.model, self._holders, self._splits[shape], ordered
            )
        return self._changed_modules[shape, names]

    def _mixes(self, task: HeldTask, images: Tensor) -> bool:
        """Whether a task can share a pass: tried once for all tasks that change the same tensors, and told if not."""
        key = tuple(images.shape[1:]), frozenset(task.changes)
        if key not in self._mixable:
            changed = self._changed(images, frozenset(task.changes))
            reason = f"{changed} is used in a way that does not tell images apart" if isinstance(changed, str) else ""
            if not reason and not self._agrees(task, random_images(images)):
                reason = "a pass for several tasks gave other numbers than the task alone"
            if reason:
                LOG.warning("these tasks take one pass each: %s", reason)
            self._mixable[key] = not reason
        return self._mixable[key]

    def _agrees(self, task: HeldTask, images: Tensor) -> bool:
        """Whether a pass of both the task and the backbone as it is gives what each alone does."""
        counts = [(task, MIDDLE), (PLAIN, len(images) - MIDDLE)]
        mixed = self._mixed(images, counts)
        alone, plain = self._alone(images[:MIDDLE], task), logits(self.model(images[MIDDLE:]))
        width = alone.shape[-1], plain.shape[-1]
        return close(alone, mixed[:MIDDLE, : width[0]]) and close(plain, mixed[MIDDLE:, : width[1]])


def _some(images: Tensor, rows: list[int]) -> Tensor:
    return images if rows == list(range(len(images))) else images[rows]


def _prediction(name: str, task: BankTask, row: Tensor) -> Prediction:
    answer = kind_of(task.metadata, name).answer
    assert answer is not None  # seen by `add`
    labels, probabilities = answer(row, task.class_names, task.metadata)
    best = max(probabilities, key=probabilities.__getitem__)
    held = {label: probabilities[label] for label in labels}
    return Prediction(name, best, probabilities[best], probabilities, held)
