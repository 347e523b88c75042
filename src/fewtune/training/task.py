"""A kind of task as a value: how a run of it is prepared, and what is done with its task files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from fewtune.config import Recipe
from fewtune.errors import DataError, Progress
from fewtune.files import Json
from fewtune.kinds import Rules
from fewtune.methods import TaskFile
from fewtune.metrics import Interval
from fewtune.plugins import later
from fewtune.training.work import Described, Work

Rows = list[Json]


class Loaded(Protocol):
    """A model with a task in it, ready to predict."""

    @property
    def delta(self) -> TaskFile:
        """The task file."""

    @property
    def backbone(self) -> Described:
        """The model, with how it is described in files."""

    @property
    def plain(self) -> Described:
        """What another task can be loaded into; the same model, where the method adds no modules."""

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's state; TuningError where the method's modules cannot be merged into the weights."""


class Evaluation(Protocol):
    """The result of a test."""

    @property
    def rows(self) -> Rows:
        """One row for every image, as files of predictions hold them."""

    def to_json(self) -> Json:
        """All measures as plain dicts, lists and numbers."""

    def tables(self) -> list[Rows]:
        """The same for a reader: tables of text, each a list of rows."""


@runtime_checkable
class Drawn(Evaluation, Protocol):
    """The result of a test whose predictions are pictures."""

    def draw(self, count: int, path: Path, accelerator: str = "auto") -> None:
        """Write a sheet of the worst `count` images as a PNG."""


class Measured(Protocol):
    """The measures of some images."""

    def to_json(self) -> Json:
        """Plain dicts, lists and numbers."""

    def tables(self, title: str) -> list[Rows]:
        """The same for a reader."""


@dataclass(frozen=True)
class Scored:
    """The measures, and one row for every image: an `Evaluation`."""

    titles: ClassVar = ("result", "result on images that were trained on")

    report: Measured | None
    """Of images that the task has not seen; None where there are none."""
    rows: Rows
    training: Measured | None = None
    """Of images that were trained on or chose the epoch, where they were asked for."""
    told: Json = field(default_factory=dict)
    """How the images were chosen."""

    def to_json(self) -> Json:
        """The measures; those of training images apart, and how the images were chosen where that needs a word."""
        return {
            **(self.report.to_json() if self.report else {}),
            **({"training_images": self.training.to_json()} if self.training else {}),
            **({"data": self.told} if self.told else {}),
        }

    def tables(self) -> list[Rows]:
        """The measures of all images, then those of every class; then the same of training images."""
        titled = zip((self.report, self.training), self.titles, strict=True)
        return [table for report, title in titled if report for table in report.tables(title)]


@dataclass(frozen=True)
class Comparison:
    """Second minus first of two files of predictions on the same images."""

    differences: Mapping[str, Interval]
    rows: Rows
    values: Json
    """As JSON."""


class Answer(NamedTuple):
    """What a task of classes says of an image."""

    labels: tuple[str, ...]
    """The classes that it has, the most probable first; one, or, where an image may have any number, any number."""
    probabilities: Mapping[str, float]
    """By class, in the order of the task file."""


@dataclass(frozen=True)
class Task:
    """A kind of task.

    name: as recipes and task files say it.
    rules: what it asks of a recipe.
    metric: the name of what validation measures; the larger the better.
    images: a recipe's data, listed and not opened: its splits by name.
    prepare: data, a fresh model, the learner: a run before it begins.
    load: a task file, whom progress is told, and a backbone that is loaded already, or None -> a model with the task.
    evaluate: test a task file on data, or an untouched model where the kind of task can.
    untouched: whether it can.
    predict: a task file or a loaded task, images, and where pictures are written -> one row for every image.
    draws: whether predictions are pictures that go into a folder.
    recognises: whether a file of predictions is of this kind.
    compare: two such files.
    pipeline: what the Hugging Face hub calls such a task.
    answer: logits of one image, class names and the task file's metadata -> the answer, where tasks are of classes;
        a bank of tasks holds these.
    by_image: what an image contributes to the metric, from its row of a file of predictions; None where the metric is
        no mean over images.
    """

    name: str
    metric: str
    images: Callable[[Recipe], Mapping[str, Sized]]
    prepare: Callable[[Recipe], Work]
    load: Callable[[Path, Progress | None, Described | None], Loaded]
    evaluate: Callable[..., Evaluation]
    predict: Callable[..., Rows]
    recognises: Callable[[Path], bool]
    compare: Callable[[Path, Path], Comparison]
    untouched: bool = False
    draws: bool = False
    pipeline: str = "image-classification"
    answer: Callable[[Tensor, Sequence[str], Mapping[str, object]], Answer] | None = None
    by_image: Callable[[Mapping[str, str]], float] | None = None
    rules: Rules = field(default_factory=Rules)


def splits_of(reference: str) -> Callable[[Recipe], Mapping[str, Sized]]:
    """`images` of a kind of task, by the function from a recipe to its data."""
    listed = later(reference)
    return lambda recipe: listed(recipe).splits


def read_rows(path: Path, recognises: Callable[[Path], bool], expected: Iterable[str]) -> dict[str, dict[str, str]]:
    """File name -> row, of a file of predictions; DataError where it is missing or of another kind."""
    import csv

    if not recognises(path):
        raise DataError(
            f"{path} must be a CSV file with the columns {', '.join(sorted(expected))}, as evaluate writes it"
        )
    with path.open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def same_images(first: str | Path, one: Iterable[str], second: str | Path, two: Iterable[str]) -> list[str]:
    """The sorted names of the images of two files of predictions; DataError where they are of different images."""
    if different := sorted({*one} ^ {*two}):
        raise DataError(
            f"{first} and {second} are about different images; {different[0]} and {len(different) - 1} more differ"
        )
    return sorted(one)


def columns(path: Path) -> Sequence[str]:
    """The header of a CSV file; empty where there is none to read."""
    import csv

    try:
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])
    except (FileNotFoundError, UnicodeDecodeError):
        return []
