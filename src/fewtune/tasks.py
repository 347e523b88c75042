"""The kinds of tasks by name, and what is done with a recipe or a task file of any kind.

`TASKS` is the one place that maps the name of a kind of task; installed packages add theirs as entry points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fewtune.config import Recipe
from fewtune.errors import DataError, DeltaError, Progress
from fewtune.hub import resolve
from fewtune.kinds import DEFAULT, KINDS
from fewtune.methods import load_task_file
from fewtune.objectives import Objective
from fewtune.plugins import Table
from fewtune.training.cluster import LOCAL
from fewtune.training.images import Transform
from fewtune.training.task import Comparison, Evaluation, Loaded, Rows, Task
from fewtune.training.work import Described, Work

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    from fewtune.training.fit import Result

__all__ = [
    "TASKS",
    "Predictor",
    "Task",
    "compare",
    "evaluate",
    "fit",
    "kind_of",
    "load_task",
    "predict",
    "prepare",
    "task_of",
]

TASKS = cast("Table[Task]", KINDS)
"""Every kind of task by name."""


def prepare(recipe: Recipe) -> Work:
    """Data and a fresh model, as a recipe's kind of task needs them; DataError or ModelError where they are not."""
    return TASKS[recipe.task].prepare(recipe)


def fit(
    recipe: Recipe | None,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    search: bool = False,
    on: str = LOCAL,
    threads: int = 1,
    prepared: Work | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    train_transform: Transform | None = None,
    objective: Objective | None = None,
) -> Result:
    """Select, train, test once, and write a run folder: `fewtune.training.fit.fit` for every kind of task.

    ``prepared``: the data of this recipe and its model, where they are there already. The last
    four are what only Python can say; see there.
    """
    from fewtune.training.fit import fit as run

    ready = prepare if prepared is None else prepared.renewed
    return run(
        recipe, out, ready, resume=resume, overwrite=overwrite, search=search, on=on, threads=threads,
        callbacks=callbacks, loggers=loggers, train_transform=train_transform, objective=objective,
    )  # fmt: skip


def task_of(delta: str | Path) -> Task:
    """The kind of task of a task file.

    Raises:
        DeltaError: it is missing or damaged, or of a kind that is not known here.
    """
    return kind_of(load_task_file(delta).metadata, str(delta))


def kind_of(metadata: Mapping[str, object], called: str = "the task") -> Task:
    """The kind of task that a task file's metadata names.

    Raises:
        DeltaError: it is not known here.
    """
    name = str(metadata.get("task", DEFAULT))
    if name not in TASKS:
        raise DeltaError(
            f"{called} is of the kind of task {name!r}, which is not known here; update fewtune, or install the "
            "package that offers it"
        )
    return TASKS[name]


def load_task(delta: str | Path, progress: Progress | None = None, backbone: Described | None = None) -> Loaded:
    """Make the model that a task file names and apply the file to it.

    Args:
        delta: the task file, or its address: ``hf://org/name[@revision]``, ``s3://…``.
        progress: told in words what slow work goes on.
        backbone: the model, loaded already, with a head of any size: `fewtune.models.load_backbone(…)`, or the `plain`
            of another loaded task. The task that is in it is taken out first, bit for bit.

    Raises:
        DeltaError: the file is missing or damaged, names no backbone, or was made for another one.
        ModelError: the backbone cannot be had.
    """
    path = resolve(delta).path
    return task_of(path).load(path, progress, backbone)


class Predictor:
    """A backbone that is loaded once, and predicts often: for one task after another, of any number of classes.

    ``Predictor("birds.safetensors").predict(["photos/"])`` loads the backbone that the task file names; `swap` puts
    another task of that backbone into the place of the first in milliseconds. For images of many tasks in one batch
    there is `fewtune.serving.TaskBank`.

    Args:
        delta: the first task file, or its address: ``hf://org/name[@revision]``, ``s3://…``.
        backbone: as in `load_task`.
        progress: told in words what slow work goes on.

    Raises:
        DeltaError, ModelError: as `load_task`.
    """

    def __init__(
        self, delta: str | Path, *, backbone: Described | None = None, progress: Progress | None = None
    ) -> None:
        self.loaded = load_task(delta, progress, backbone)
        self._kind = task_of(resolve(delta).path)

    def swap(self, delta: str | Path) -> None:
        """Puts another task in the place of the present one.

        Raises:
            DeltaError: the file is damaged or of another backbone; the present task stays.
        """
        self.loaded = load_task(delta, backbone=self.loaded.plain)
        self._kind = task_of(resolve(delta).path)

    def predict(self, images: Iterable[str | Path], **options: object) -> Rows:
        """One row for every image, by the present task; the options are those of `fewtune.tasks.predict`.

        Raises:
            DataError: a path is missing or unreadable, or there is no image.
            DeltaError: another task was loaded into this backbone elsewhere.
        """
        return self._kind.predict(self.loaded, images, **options)


def evaluate(delta: str | Path, data: str, **options: object) -> Evaluation:
    """Test a task file of any kind; the options are those of `classification.evaluate` or `segmentation.evaluate`."""
    path = resolve(delta).path
    return task_of(path).evaluate(data, delta=path, **options)


def predict(delta: str | Path, images: Iterable[str | Path], **options: object) -> Rows:
    """One row for every image, by a task file of any kind; masks are drawn into the folder `out`."""
    path = resolve(delta).path
    return task_of(path).predict(path, images, **options)


def compare(first: Path, second: Path) -> Comparison:
    """Second minus first of two files of predictions of the same images.

    Raises:
        DataError: a file is missing, is none of predictions, or they are of different images.
    """
    for task in TASKS.values():
        if task.recognises(first):
            return task.compare(first, second)
    if not first.exists():
        raise DataError(f"there is no file of predictions at {first}")
    raise DataError(
        f"{first} must be a CSV file with the columns file, label and prediction, or with measures of masks, as "
        "evaluate writes it"
    )
