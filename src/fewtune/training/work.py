"""What a recipe is turned into before it is trained: data, a fresh model, and what the kind of task makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fewtune.config import Recipe
from fewtune.methods.base import Tuner
from fewtune.objectives import Objective

if TYPE_CHECKING:
    from fewtune.training.folder import RunFolder
    from fewtune.training.module import Learner


@dataclass(frozen=True)
class Work(ABC):
    """One run before it begins. `fit`, the search and the tuners know no more of a task than this."""

    recipe: Recipe
    data: Any
    """Its splits: `train`, and `val` and `test`, either of which may be None."""
    backbone: Any
    """A fresh model: `model`, `head` (names of the modules that are trained whole) and `describe()`."""

    learner_class: ClassVar[type[Learner]]

    @abstractmethod
    def learner(self, attach: Callable[[Learner], Tuner]) -> Learner:
        """The Lightning module of this task; `attach` gives its tuner."""

    @property
    @abstractmethod
    def train(self) -> Any:
        """The training images as the recipe shows them."""

    @property
    @abstractmethod
    def scored(self) -> Any:
        """The training images as importance looks at them."""

    @abstractmethod
    def evaluated(self, split: Any) -> Any:
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
    def classes(self) -> int:
        """Number of classes of the labels."""

    @abstractmethod
    def renewed(self, recipe: Recipe) -> Work:
        """The same data with another fresh model, for `recipe`."""

    @abstractmethod
    def describe(self, **more: Any) -> dict[str, Any]:
        """The metadata of the task file."""

    @abstractmethod
    def test(self, folder: RunFolder) -> dict[str, Any]:
        """Read the test set, once: what joins the run's metrics. Empty where there is none."""

    def fresh_model(self) -> nn.Module:
        """The untouched model once more."""
        model: nn.Module = self.renewed(self.recipe).backbone.model
        return model
