"""Criteria that score a model's connections: the values of `importance=` in a recipe.

A criterion is a function from a run to scores. `CRITERIA` maps names to them; an installed package adds its own by an
entry point of the group ``fewtune.criteria``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fewtune.delta import load_delta
from fewtune.errors import ConfigError
from fewtune.importance import (
    Scores,
    correlation_importance,
    difference_importance,
    gradient_importance,
    magnitude_importance,
    random_importance,
    snr_importance,
    wanda_importance,
)
from fewtune.methods.base import Excluding, Run, Settings
from fewtune.plugins import Table

Criterion = Callable[[Run], Scores]
TASK_FILE = "delta.safetensors"
"""The name of the task file in the folder of a run."""


def gradient(run: Run) -> Scores:
    """The modulus of the summed gradient of the run's objective over its training images (Eq. 1)."""
    model, exclude = run.scored_model(), run.settings(Excluding).exclude
    settle = run.settings(CriterionSettings).settle
    return gradient_importance(model, run.scored_batches(), run.objective, run.head, exclude=exclude, settle=settle)


def correlation(run: Run) -> Scores:
    """The same gradient with each input column centred and in units of its own spread."""
    model, exclude = run.model.to(run.device), run.settings(Excluding).exclude
    return correlation_importance(model, run.scored_batches(), run.objective, run.head, exclude=exclude)


def snr(run: Run) -> Scores:
    """How far the batches agree on a connection's gradient."""
    model, exclude = run.model.to(run.device), run.settings(Excluding).exclude
    return snr_importance(model, run.scored_batches(), run.objective, run.head, exclude=exclude)


def wanda(run: Run) -> Scores:
    """The modulus of the weight times the size of its input, on the training images as they are evaluated."""
    batches, exclude = run.plain_batches("train"), run.settings(Excluding).exclude
    assert batches is not None
    return wanda_importance(run.model.to(run.device), batches, run.head, exclude=exclude)


def magnitude(run: Run) -> Scores:
    """The modulus of the pretrained weight."""
    return magnitude_importance(run.model, head=run.head)


def random(run: Run) -> Scores:
    """Uniform random numbers of the run's seed."""
    return random_importance(run.model, run.seed, head=run.head)


def oracle(run: Run) -> Scores:
    """How far a full fine-tuning moved each connection."""
    return difference_importance(run.model, oracle_weights(run), head=run.head)


CRITERIA: Table[Criterion] = Table(
    "fewtune.criteria",
    "criterion",
    {
        "gradient": gradient,
        "correlation": correlation,
        "snr": snr,
        "wanda": wanda,
        "magnitude": magnitude,
        "random": random,
        "oracle": oracle,
    },
)


OF_IMAGES: frozenset[Criterion] = frozenset({gradient, correlation, snr, wanda})
"""Those that look at the training images: a grid keeps their scores. Magnitudes and random numbers cost nothing."""
WITHOUT_SAMPLE: frozenset[Criterion] = frozenset({wanda, magnitude, random, oracle})
"""Those that `scored_images` says nothing to. One from outside may ask for `Run.scored_batches`."""


class CriterionSettings(Settings):
    """Which criterion, and what it needs."""

    importance: str = Field("gradient", description=f"what scores the connections: {', '.join(CRITERIA.present)}")
    settle: float | None = Field(
        None, gt=0, le=1, description="end scoring when this share of the neurons has the same largest connection as "
        "after half as many batches (gradient); left out, all training images are scored",
    )  # fmt: skip
    scored_images: int | None = Field(
        None, gt=0, description="score connections on about this many training images, in whole batches (gradient, "
        "correlation, snr); left out, on all",
    )  # fmt: skip
    oracle: str | None = Field(None, description="for importance=oracle: run folder or task file of a method=full run")

    @field_validator("importance")
    @classmethod
    def _known_criterion(cls, importance: str) -> str:
        return CRITERIA.known(importance)

    @field_validator("settle", "scored_images")
    @classmethod
    def _read_by_its_criterion(cls, given: float | None, info: ValidationInfo) -> float | None:
        importance = info.data.get("importance")
        if given is None or importance is None:
            return given
        criterion = CRITERIA[importance]
        if info.field_name == "settle" and criterion is not gradient:
            raise ValueError(f"only importance=gradient reads it, and importance is {importance}; leave it out")
        if info.field_name == "scored_images" and criterion in WITHOUT_SAMPLE:
            raise ValueError(f"importance={importance} does not read it; leave it out, or score by gradient")
        return given

    @field_validator("oracle")
    @classmethod
    def _oracle_and_importance(cls, oracle: str | None, info: ValidationInfo) -> str | None:
        importance = info.data.get("importance", "oracle")
        if oracle is None and info.data.get("importance") == "oracle":
            raise ValueError("importance=oracle needs a full fine-tuning: the run folder or task file of method=full")
        if oracle is not None and importance != "oracle":
            raise ValueError(f"only importance=oracle reads it, and importance is {importance}")
        return oracle


def oracle_weights(run: Run) -> dict[str, Tensor]:
    """All parameters, by name, as the recipe's `oracle`, a full fine-tuning of this backbone, left them.

    Raises:
        ConfigError: a folder without a task file, or a task file of another method.
        DeltaError: the task file is missing or damaged, or of another backbone or other classes.
    """
    path = Path(run.settings(CriterionSettings).oracle or "")
    if path.is_dir():
        path = path / TASK_FILE
        if not path.exists():
            raise ConfigError(f"oracle: {path.parent} holds no {path.name}; give the folder of a finished run")
    delta = load_delta(path)
    method = delta.metadata.get("method", "unknown")
    if method != "full":
        raise ConfigError(f"oracle: {path} is of a run with method={method}; expected one of method=full")
    with delta.applied_to(run.model):
        return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
