"""The grid of the ablations: draws of images, and trials on them in the order in which they are worth running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photographs import recipe, source

SEEDS = (0, 1, 2)
TASK = "trashnet"
BLOCKS = 12
RATES = {"gps": (1e-3, 3e-3, 1e-2), "gps-many": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4)}
"""Learning rates that are tried: of all selections with K = 1 or 2, of those with more, of full fine-tuning."""
SEARCH_EPOCHS = 4

IMAGES = {"image_size": 70, "limit_train": 400, "limit_test": 1000, "batch_size": 16, "epochs": 8}
"""320 images to train, 80 to validate; 160 steps."""


@dataclass(frozen=True)
class Draw:
    """Which images: a data set, the seed of the draw, and the number of images of each class where it is few."""

    task: str
    seed: int
    shots: int | None = None

    @property
    def key(self) -> str:
        return f"{self.task}{'' if self.shots is None else f'-{self.shots}shot'}-{self.seed}"


@dataclass(frozen=True)
class Trial:
    """One run: images, method, and the settings in which it differs; `rate` names its group of `RATES`."""

    draw: Draw
    name: str
    method: str = "gps"
    rate: str | None = "gps"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        return f"{self.draw.key}-{self.name}"


CRITERIA: dict[str, dict[str, Any]] = {
    "gps": {},
    "layer": {"granularity": "layer"},
    "network": {"granularity": "network"},
    "neuron-random": {"importance": "random"},
    "net-random": {"importance": "random", "granularity": "network"},
    "magnitude": {"importance": "magnitude"},
    "head-ce": {"objective": "cross_entropy"},
    "oracle": {"importance": "oracle"},
}
"""Granularities and criteria, all with as many connections as K = 1 gives."""

MANY = (2, 5, 10, 20)
FIRST = (3, 6, 9)
SHOTS = (1, 2, 4, 8, 16)
FEW = {"gps": "gps", "full": "full", "linear": None}
EPOCHS_OF_SHOTS = {1: 12, 2: 12, 4: 12, 8: 12, 16: 6}
BATCH_OF_SHOTS = {1: 2, 2: 4, 4: 8, 8: 16, 16: 16}
"""About 36 steps whatever the number of images."""


def _criteria(seed: int) -> Iterator[Trial]:
    for name, settings in CRITERIA.items():
        yield Trial(Draw(TASK, seed), name, settings=settings)


def _few(seed: int) -> Iterator[Trial]:
    for shots in SHOTS:
        settings = {"epochs": EPOCHS_OF_SHOTS[shots], "batch_size": BATCH_OF_SHOTS[shots], "limit_test": 300}
        for method, rate in FEW.items():
            yield Trial(Draw("flowers", seed, shots), method, method, rate, settings)


def _k(seed: int) -> Iterator[Trial]:
    for k in MANY:
        yield Trial(Draw(TASK, seed), f"k{k}", rate="gps" if k == 2 else "gps-many", settings={"k": k})


def _location(seed: int) -> Iterator[Trial]:
    for n in FIRST:
        settings = {"exclude": [f"blocks.{block}" for block in range(n)]}
        yield Trial(Draw(TASK, seed), f"without-first-{n}", settings=settings)


def _blocks(seed: int) -> Iterator[Trial]:
    for block in (0, 1, 3, 11, 5, 8, 2, 10, 4, 7, 6, 9):  # the paper's two worst (its blocks 2 and 4), then spread
        yield Trial(Draw(TASK, seed), f"without-block-{block}", settings={"exclude": [f"blocks.{block}"]})


def _trials() -> Iterator[Trial]:
    for seed in SEEDS:
        yield Trial(Draw(TASK, seed), "full", "full", "full")
        yield Trial(Draw(TASK, seed), "linear", "linear", None)
        yield from (*_criteria(seed), *_k(seed), *_location(seed))
    yield from _few(0)
    yield from _blocks(0)
    for seed in SEEDS[1:]:
        yield from _few(seed)


TRIALS = tuple(_trials())
"""In the order in which they are worth running."""

DRAWS = tuple(dict.fromkeys(trial.draw for trial in TRIALS))
COMPARED_DRAWS = (Draw("flowers", 0), Draw("textile", 0), *(Draw(TASK, seed) for seed in SEEDS))
"""Draws of images whose selections by GPS are compared: over tasks and over seeds."""


def base_recipe(draw: Draw, method: str, cache: Path, **changed: Any) -> Any:
    """The recipe of a draw of images before what a trial changes."""
    shots = {} if draw.shots is None else {"shots": draw.shots}
    return recipe(source(draw.task, cache), method, draw.seed, **{**IMAGES, **shots, **changed})


def recipe_of(trial: Trial, cache: Path, out: Path) -> Any:
    """The recipe of a trial, with its group's learning rate and its selection's file."""
    settings = dict(trial.settings)
    if trial.rate is not None:
        settings["lr"] = json.loads((out / f"rate-{trial.rate}.json").read_text())["lr"]
    if trial.method == "gps":
        settings |= {"selection": str(selection_file(trial, out)), **oracle_of(trial, out)}
    return base_recipe(trial.draw, trial.method, cache, **settings)


def oracle_of(trial: Trial, out: Path) -> dict[str, str]:
    """The oracle is full fine-tuning on the same images."""
    wanted = trial.settings.get("importance") == "oracle"
    return {"oracle": str(out / f"{trial.draw.key}-full")} if wanted else {}


def selection_file(trial: Trial, out: Path) -> Path:
    return out / "selections" / f"{trial.key}.safetensors"


def search_recipe_of(group: str, cache: Path) -> Any:
    """Short runs of seed 0: K = 1 and K = 10 stand for their groups."""
    method = "full" if group == "full" else "gps"
    k = {"gps": (1.0,), "gps-many": (10.0,)}.get(group, (1.0,))
    short = {"search_lr": RATES[group], "search_k": k, "search_epochs": SEARCH_EPOCHS}
    return base_recipe(Draw(TASK, 0), method, cache, **short)
