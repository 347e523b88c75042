"""A prepared run: data, a fresh model, its loss and its test, whatever the kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import nn

from fewtune.config import Recipe
from fewtune.files import Json
from fewtune.methods.base import Tuner
from fewtune.objectives import Objective
from fewtune.training.images import Images, Transform
from fewtune.training.seen import record

if TYPE_CHECKING:
    from fewtune.training.learner import Learner
    from fewtune.training.run_folder import RunFolder

DECODED_FIRST = 20_000
"""A set of at most so many images is decoded once before anything else is done."""


class Splits(Protocol):
    """The data of a run."""

    @property
    def train(self) -> Images:
        """What is trained on."""

    @property
    def val(self) -> Images | None:
        """What judges an epoch; None where all is trained on."""

    @property
    def test(self) -> Images | None:
        """What is read once, at the end."""


class Described(Protocol):
    """A model with what is known of it."""

    @property
    def model(self) -> nn.Module:
        """The module."""

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole."""

    @property
    def image_size(self) -> int:
        """Side of its input in pixels."""

    def describe(self) -> Json:
        """From what it can be made again."""


def division(recipe: Recipe) -> Json:
    """How a recipe divides its images, as arguments of what loads them."""
    keys = ("seed", "val_fraction", "test_fraction", "limit_train", "limit_test")
    return {key: getattr(recipe, key) for key in keys}


@dataclass(frozen=True)
class Start:
    """Where training begins when that is a result of its own.

    ``name``: what it is called. ``validation``: what the validation images say of it, by measure and "loss"; empty
    where there are none.
    """

    name: str
    validation: dict[str, float]


@dataclass(frozen=True)
class Work(ABC):
    """One run before it begins. `fit`, the search and the tuners know no more of a task than this."""

    recipe: Recipe
    data: Splits
    backbone: Described
    """A fresh model."""
    listed: Splits | None = field(default=None, kw_only=True)
    """The data as it lies on disk, where `data` is kept in memory in another size."""
    train_transform: Transform | None = field(default=None, kw_only=True)
    """A user's own, in place of the recipe's augmentation; images are evaluated as the recipe says all the same, so
    that the task file needs nothing but itself."""
    importance_objective: Objective | None = field(default=None, kw_only=True)
    """A user's own, in place of the objective that the recipe names."""

    learner_class: ClassVar[type[Learner]]

    def learner(self, attach: Callable[[Learner], Tuner]) -> Learner:
        """The Lightning module: trains on the training images, judges on the validation images as they are evaluated,
        where there are some. `attach` gives its tuner."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return self.learner_class(self.backbone.model, self.recipe, self.train, val, attach)

    @property
    @abstractmethod
    def train(self) -> Images:
        """The training images as the recipe shows them."""

    @property
    @abstractmethod
    def scored(self) -> Images:
        """The training images as importance looks at them."""

    @abstractmethod
    def evaluated(self, split: Images) -> Images:
        """The images of a split as they are evaluated."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What importance is the gradient of."""

    @property
    @abstractmethod
    def loss(self) -> Objective:
        """The scalar training loss of a batch that is not mixed."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The classes of the labels."""

    @property
    def classes(self) -> int:
        """Number of classes of the labels."""
        return len(self.class_names)

    @abstractmethod
    def renewed(self, recipe: Recipe) -> Work:
        """The same data with another fresh model, for `recipe`."""

    @abstractmethod
    def untested(self) -> Work:
        """The same without its test images."""

    @abstractmethod
    def test(self, folder: RunFolder) -> Json:
        """Read the test set, once: what joins the run's metrics. Empty where there is none."""

    def start(self) -> Start | None:
        """Bring the fresh model to where training begins; None where it begins as it was made."""
        return None

    def test_start(self, folder: RunFolder) -> Json:
        """What the test images say of the model as training began, once `test` has read them."""
        return {}

    def settled(self) -> Work:
        """With what is chosen on validation images once the model is trained; nothing, as a rule."""
        return self

    def describe(self, **more: object) -> Json:
        """The metadata of the task file: what a reader of the file wants to know, and what makes the model again."""
        return {
            "task": self.recipe.task,
            "backbone": self.backbone.describe(),
            "class_names": list(self.class_names),
            "transform": self.recipe.augment,
            "method": self.recipe.method,
            "data": self.recipe.data,
            "recipe": self.recipe.model_dump(mode="json"),
            "seen": record(((self.listed or self.data).train, (self.listed or self.data).val)),
            **more,
        }

    def fresh_model(self) -> nn.Module:
        """The untouched model once more."""
        return self.renewed(self.recipe).backbone.model
