"""GPS, Gradient-based Parameter Selection: of every neuron the K connections with the largest score, biases and scales.

Scores are of a criterion (`importance=`), the paper's where none is named: the gradient of the supervised contrastive
loss on the training images (Eq. 1-2). The selected connections are trained through compact values (Eq. 5-6).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fewtune.errors import SelectionError
from fewtune.importance import Scores
from fewtune.methods.base import Excluding, Method, Prepared, Run
from fewtune.methods.criteria import CRITERIA, CriterionSettings, oracle_weights
from fewtune.methods.gradual import next_part
from fewtune.neurons import excluded
from fewtune.selection import Selection, select
from fewtune.tuning import Tuner, add_noise, attach, column_rms

log = logging.getLogger("fewtune")

UNIT_BATCHES = 32
"""Of training images, at most: from what the columns are given there the units of values are taken."""


class Settings(CriterionSettings, Excluding):
    """Which connections are trained."""

    selection: str | None = Field(None, description="a file of `fewtune select`; nothing is selected anew")
    k: float | None = Field(None, gt=0, description="connections per neuron; 1 where no budget is given")
    budget: float | None = Field(None, gt=0, le=1, description="selected fraction of the backbone's weights")
    granularity: Literal["neuron", "layer", "network", "columns"] = Field(
        "neuron",
        description="among what the best connections are chosen: each neuron's, a layer's, all of the network; "
        "columns: all neurons of a layer train the same k inputs",
    )
    stages: int = Field(
        1, gt=0, description="choose the budget in so many parts over the first half of training, each by the weights "
        "as they are by then, none taken back",
    )  # fmt: skip
    objective: str | None = Field(None, description="left out: supcon; of segmentation, always its own loss")
    units: Literal["weight", "input"] = Field(
        "weight", description="input: a connection is trained as its change times the rms of its input column, so that "
        "one learning rate moves every neuron's output alike",
    )  # fmt: skip
    noise: float = Field(
        0.0, ge=0, description="sigma of the noise on what tuning has changed, in training (PACE); falls with depth"
    )
    temperature: float = Field(0.07, gt=0, description="of the supervised contrastive loss")
    bias: Literal["all", "none"] = Field("all", description="whether biases outside normalisations are trained")
    scale: Literal["all", "none"] = Field("all", description="whether layer-scale vectors are trained")
    norm: Literal["none", "all"] = Field("none", description="whether weights and biases of normalisations are trained")
    relative_position: Literal["none", "all"] = Field("none", description="whether tables of positions are trained")

    @field_validator("granularity")
    @classmethod
    def _neurons_need_one(cls, granularity: str, info: ValidationInfo) -> str:
        if granularity == "neuron" and (info.data.get("k") or 1) < 1:
            raise ValueError(f"k={info.data['k']:g} is less than one connection a neuron; take 'layer' or 'network'")
        if granularity == "columns" and ((info.data.get("k") or 1) % 1 or info.data.get("budget") is not None):
            raise ValueError("all neurons of a layer have the same number of columns: say a whole k, and no budget")
        return granularity

    @field_validator("budget")
    @classmethod
    def _one_of_k_and_budget(cls, budget: float | None, info: ValidationInfo) -> float | None:
        if budget is not None and info.data.get("k") is not None:
            raise ValueError("k and budget say the same thing twice; give one of them")
        return budget

    @field_validator("stages")
    @classmethod
    def _can_be_chosen_bit_by_bit(cls, stages: int, info: ValidationInfo) -> int:
        if stages > 1 and info.data.get("selection") is not None:
            raise ValueError("a selection from a file is there from the beginning; leave stages or selection out")
        if stages > 1 and info.data.get("granularity") == "columns":
            raise ValueError("granularity=columns chooses whole columns at once; leave stages out")
        if stages > 1 and info.data.get("importance") == "oracle":
            raise ValueError("importance=oracle knows the end from the beginning; leave stages out")
        return stages

    @property
    def per_neuron(self) -> float | None:
        """K, or None where a budget is given."""
        return self.k if self.k is not None or self.budget is not None else 1.0


def score(run: Run) -> Scores:
    """Scores of all connections by the recipe's criterion."""
    return CRITERIA[run.settings(Settings).importance](run)


def choose(settings: Settings, scores: Scores) -> Selection:
    """The selection that a recipe asks for."""
    k = settings.per_neuron
    if k is not None and k % 1 and settings.granularity == "neuron":
        log.info(
            "k=%g: %d connections of every neuron, and one more of the %.0f %% of the neurons whose next scores are "
            "the largest", k, int(k), 100 * (k % 1),
        )  # fmt: skip
    selection = select(
        scores,
        k=settings.per_neuron,
        budget=settings.budget,
        granularity=settings.granularity,
        bias=settings.bias,
        scale=settings.scale,
        norm=settings.norm,
        relative_position=settings.relative_position,
        exclude=settings.exclude,
    )
    if selection.warning:
        log.warning("warning: %s", selection.warning)
    return selection


def _prepare(run: Run, scores: Scores | None) -> Selection:
    settings = run.settings(Settings)
    if settings.selection is not None:
        return _read(settings, settings.selection)
    scores = score(run) if scores is None else scores
    return next_part(scores, partial(choose, settings), None, 1 / settings.stages)


def _grow(run: Run, chosen: Selection, stage: int) -> Selection:
    settings = run.settings(Settings)
    return next_part(score(run), partial(choose, settings), chosen, (stage + 1) / settings.stages)


def _read(settings: Settings, file: str) -> Selection:
    """The selection of a file; SelectionError where it trains something below the recipe's reach."""
    selection = Selection.load(file)
    if settings.reach is not None:
        below = excluded(selection.anatomy, settings.exclude)
        if wrong := [name for name in (*selection.places, *selection.whole) if name in below]:
            raise SelectionError(
                f"selection={file} trains {wrong[0]}, which lies below reach={settings.reach}; select anew with this "
                "reach, or leave it out"
            )
    return selection


def _attach(run: Run, prepared: Prepared | None) -> Tuner:
    assert isinstance(prepared, Selection)
    settings, seen = run.settings(Settings), None
    if settings.units == "input":
        views = {name: prepared.anatomy.views[name] for name in prepared.places}
        seen = column_rms(run.model.to(run.device), run.training_batches(), views, limit=UNIT_BATCHES)
    tuner = attach(run.model, prepared, column_rms=seen)
    add_noise(tuner, settings.noise)
    return tuner


def _check(run: Run) -> None:
    if run.settings(Settings).oracle is not None:
        oracle_weights(run)


GPS = Method(
    "gps", _attach, Settings, score=score, prepare=_prepare, load=Selection.load, check=_check, grow=_grow
)  # fmt: skip
