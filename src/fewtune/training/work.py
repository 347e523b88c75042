"""What a recipe is turned into before it is trained: data, a fresh model, and what the kind of task makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fewtune.config import Recipe
from fewtune.importance import Scores

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
    def learner(self, attach: Callable[[Learner], Any]) -> Learner:
        """The Lightning module of this task; `attach` gives its tuner."""

    @abstractmethod
    def score(self, device: torch.device, *, world: int = 1, rank: int = 0) -> Scores:
        """Scores of all connections, from the training images alone; of several processes each takes its share."""

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
