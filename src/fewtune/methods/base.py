"""A method as a value, what it may ask of a run, and the tuner and task file that it gives.

A method is a frozen value of `Method`; `fewtune.methods.METHODS` maps the names of recipes to them. Training knows no
method by name: it prepares one, attaches it, steps what its tuner trains, and saves the task file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewtune.files import Json
from fewtune.importance import Scores
from fewtune.kinds import KINDS, Rules
from fewtune.objectives import Objective
from fewtune.selection import Selection
from fewtune.tuning import attach
from fewtune.tuning.groups import ParamGroup

State = Mapping[str, Mapping[str, Tensor]]
"""A tuner's compact state: tensors by name, in groups."""
Batch = tuple[Tensor, Tensor]
"""Images [B, 3, S, S] and their labels or masks."""
Views = tuple[Tensor | Sequence[Tensor], Tensor]
"""The same, or a pair of views of the images."""


class TaskFile(Protocol):
    """A task in the making, or as it was read: `fewtune.Delta`, or `MethodFile` where a method adds modules."""

    @property
    def metadata(self) -> Json:
        """What its maker noted: JSON values by name."""

    @property
    def trained(self) -> int:
        """Number of trained parameters."""

    @property
    def connections(self) -> int:
        """Number of selected connections of the backbone's own weights."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """New running statistics, where training changed them."""

    def per_layer(self) -> dict[str, int]:
        """How much of every tensor is trained, by name."""

    def summary(self) -> str:
        """A table of what is trained."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""

    def apply(self, model: nn.Module) -> Tuner | None:
        """Put the task into a plain model of the same backbone; the tuner where modules were added, else None."""


class Tuner(Protocol):
    """A model of which some parameters are trained. `fewtune.Tuner` is one, and every method gives one."""

    @property
    def trained(self) -> int:
        """Number of trained parameters."""

    @property
    def backbone_parameters(self) -> int:
        """Number of the plain model's parameters outside the head."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what is trained, for an optimiser."""

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[ParamGroup]:
        """Two groups for an optimiser, backbone and head, each with its learning rate where one is given."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The compact trained state."""

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` gave. TuningError where it is of another model or method."""

    def sync(self) -> None:
        """Write the values into the weights: after any change of them that was not a step of a torch optimiser."""

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's own tensors under their original names, without anything that was added."""

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The state of a plain model with the same outputs; TuningError where the method cannot be merged."""

    def delta(self, metadata: Mapping[str, object] | None = None) -> TaskFile:
        """The task as a file in the making: ``tuner.delta(metadata).save(path)``."""


class Settings(BaseModel):
    """The recipe's keys that a method reads: a recipe is an instance of the settings of every method.

    A method declares its own as pydantic fields of a subclass, each with a default and a description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Excluding(Settings):
    """The settings of a method that can leave modules as they are."""

    exclude: tuple[str, ...] = Field((), description="glob patterns of modules and parameters that are not trained")
    reach: Annotated[int, Field(gt=0)] | Literal["half"] | None = Field(
        None, description="train in the last so many blocks only (of a convolutional network: stages); half: of them"
    )


S = TypeVar("S", bound=Settings)


class Run(Protocol):
    """What a method may ask of a run before it trains: its model, its settings, and its training images.

    Of several processes each is given its own share of the images.
    """

    @property
    def model(self) -> nn.Module:
        """The backbone, plain, with a new head."""

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole: the classifier, or a segmenter's decoder."""

    @property
    def device(self) -> torch.device:
        """Where the model is trained; it may not be there yet."""

    @property
    def seed(self) -> int:
        """Of everything random in the run."""

    @property
    def classes(self) -> int:
        """Number of classes of the labels."""

    def settings(self, kind: type[S]) -> S:
        """The recipe, as the settings of one method; `exclude` names what lies below its `reach` too."""

    def fresh_model(self) -> nn.Module:
        """The untouched model once more."""

    def scored_model(self) -> nn.Module:
        """The model on its device for `fewtune.gradient_importance`; its weights may be shared out among processes."""

    def scored_batches(self) -> Iterable[Views]:
        """All training images once, as importance looks at them (two views each where the objective contrasts)."""

    @property
    def objective(self) -> Objective:
        """What importance is the gradient of: the recipe's, or the task's own."""

    def training_batches(self) -> Iterable[Batch]:
        """The training images of the first epoch, in its order, augmented as the recipe says and never mixed."""

    @property
    def loss(self) -> Objective:
        """The task's training loss of such a batch, a scalar."""

    def plain_batches(self, part: Literal["train", "val"]) -> Iterable[Batch] | None:
        """The images of "train" or "val" in order, as they are evaluated; None where there are none."""


class Prepared(Protocol):
    """What a method works out from the training images before it trains. A run saves it and goes on from the file."""

    def save(self, path: Path) -> None:
        """Write it as one file."""


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried on the validation images."""

    setting: dict[str, float]
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Fitted:
    """What training in one go ends with: the tuner, what joins the run's metrics, and what was tried."""

    tuner: Tuner
    validation: Json
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Training in one go instead of by epochs.

    run: does it. can: whether it can for a kind of task. chooses: the settings that it chooses on validation images
    where the recipe leaves them out.
    """

    run: Callable[[Run], Fitted]
    can: Callable[[Rules], bool]
    chooses: tuple[str, ...] = ()


class Insertion(Protocol):
    """Modules that a method puts into a model, as a task file keeps them: by the method's name and settings."""

    @property
    def name(self) -> str:
        """The method's."""

    def settings(self) -> Json:
        """All that is needed to make it again, able to go into JSON, but for the tensors."""

    def arrays(self) -> dict[str, Tensor]:
        """Settings that are tensors."""

    def attach(self, model: nn.Module, head: tuple[str, ...], *, seed: int = 0) -> Tuner:
        """Put the modules into a plain model."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    name: as recipes and task files say it.
    attach: from a run, and what was prepared for it (None without `prepare`), to a tuner; the model is on its device.
    settings: the recipe's keys that it reads.
    score: scores of all connections, where the method selects by them; taken once for all candidates of a search.
    prepare: what it works out from training images, given the scores where they are known already.
    load: reads the file of what was prepared.
    check: refuses, before anything is written, what the settings ask for and cannot be.
    fit: how it is trained where not by epochs.
    grow: what is trained from a stage on (`stages=`), given what was trained before it and its number, from 1 on; the
    run's model holds the tuned weights then.
    read: the modules of a task file from their settings and tensors, where the method adds modules.
    starts_plain: whether the attached model, before its first step, predicts what the plain one does.
    """

    name: str
    attach: Callable[[Run, Prepared | None], Tuner]
    settings: type[Settings] = Settings
    score: Callable[[Run], Scores] | None = None
    prepare: Callable[[Run, Scores | None], Prepared] | None = None
    load: Callable[[Path], Prepared] | None = None
    check: Callable[[Run], None] | None = None
    fit: Fit | None = None
    grow: Callable[[Run, Selection, int], Selection] | None = None
    read: Callable[[Json, Mapping[str, Tensor]], Insertion] | None = None
    starts_plain: bool = True

    def trains_by_epochs(self, task: str) -> bool:
        """Whether a run of this kind of task has epochs, a learning rate and a schedule."""
        return self.fit is None or not self.fit.can(KINDS[task].rules)

    @property
    def excludes(self) -> bool:
        """Whether modules can be left as they are."""
        return issubclass(self.settings, Excluding)


def selecting(name: str, selection: Callable[[Run], Selection], settings: type[Settings] = Settings) -> Method:
    """The method that trains what a function of the run selects without looking at an image."""
    return Method(name, lambda run, prepared: attach(run.model, selection(run)), settings)
