"""Learning rate, K and drop path by short runs judged on validation images; the test set is not read.

Optuna says what to try next and which run is hopeless (`fewtune.training.study`).
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.files import Json
from fewtune.importance import Scores
from fewtune.methods import Tuner
from fewtune.methods.base import Method, Prepared
from fewtune.progress import counted, duration
from fewtune.training.learner import Learner, NonFiniteLoss
from fewtune.training.stages import Stages
from fewtune.training.study import Space, Study
from fewtune.training.trainer import build_trainer
from fewtune.training.tuners import Share, begin, method_of, score

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class SearchResult:
    """The recipe with the best settings, and a row for every trial."""

    best: Recipe
    rows: list[Json]


@dataclass(frozen=True)
class Shared:
    """What all trials share: scores of the connections, or whatever else a method prepares from the images."""

    scores: Scores | None = None
    prepared: list[Prepared] = field(default_factory=list)
    """At most one, of the first trial."""


def check_search(recipe: Recipe, method: Method) -> None:
    """ConfigError where there is nothing to search, or in a run of several processes."""
    if not method.trains_by_epochs(recipe.task):
        raise ConfigError(f"method={method.name} has no learning rate or K to search; leave --search out")
    if recipe.train_on != "train":
        raise ConfigError("--search judges on validation images; leave train_on=train+val out")
    if recipe.num_nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--search runs in one process; search on one machine, then train with its result")
    if method.score is not None and recipe.selection is not None:
        raise ConfigError("--search makes selections of its own; leave selection= out")


def search_recipe(work: Work, storage: Path) -> SearchResult:
    """Runs of `search_epochs` epochs; the best by validation accuracy (or what else the task measures), of equals by
    the lower loss.

    The listed learning rates come first, then what Optuna's TPE draws between them. A run whose validation curve
    falls below the median of the others ends early, and is not chosen. There are `search_trials` runs, and none begins
    after `search_seconds`; a study that lies in `storage` goes on, with the seconds that it has spent.

    A method that selects by scores is scored once, and each K selects from these; what another method prepares from
    the images is prepared once too, by the first run. Only the former has a K. A run whose loss is not finite counts
    as 0.

    Args:
        work: the run that is to be trained with what is chosen.
        storage: the study's SQLite file.

    Raises:
        ConfigError: there is nothing to search, or the run is one of several processes.
        MissingExtra: Optuna is not installed.
    """
    recipe, method = work.recipe, method_of(work)
    check_search(recipe, method)
    started = time.perf_counter()
    space = Space(recipe.search_lr, recipe.search_k if method.score is not None else (), recipe.search_drop_path)
    study = Study(storage, space, recipe.seed)
    limit = recipe.search_trials or (space.size if recipe.search_seconds is None else None)
    shared = Shared(None if method.score is None else score(work))
    with counted("search", limit) as told:
        while _goes_on(study, limit, recipe.search_seconds):
            study.spend(time.perf_counter() - started)
            started = time.perf_counter()
            _try(work, study, shared, started)
            told(len(study.done), limit)
            log.info(
                "search %d%s: %s", len(study.done), f" of {limit}" if limit else "", _line(_row(work, study.done[-1]))
            )
            if len(study.done) == 1 and limit and recipe.search_seconds is None:
                rest = (time.perf_counter() - started) * (limit - 1)
                log.info("at most about %s for the rest of the search", duration(rest))
    study.spend(time.perf_counter() - started)
    log.info("best: %s", _line(_row(work, study.best())))
    return SearchResult(_chosen(recipe, study.best().params), [_row(work, trial) for trial in study.done])


def _goes_on(study: Study, limit: int | None, seconds: float | None) -> bool:
    """Whether another trial begins: always until one is complete, then as the number and the time allow."""
    if not study.complete:
        return True
    return (limit is None or len(study.done) < limit) and (seconds is None or study.seconds < seconds)


def _chosen(recipe: Recipe, params: dict[str, Any]) -> Recipe:
    budget = None if "k" in params else recipe.budget
    return recipe.changed(**{**params, "budget": budget})


def _short(recipe: Recipe, params: dict[str, Any]) -> Recipe:
    """The recipe of a trial."""
    share = -(-recipe.warmup * recipe.search_epochs // recipe.epochs)  # of the warm-up, rounded up
    return _chosen(recipe, params).changed(
        epochs=recipe.search_epochs, warmup_epochs=min(share, recipe.search_epochs - 1), devices=1, strategy="auto",
        stop_after=None,
    )  # fmt: skip


def _row(work: Work, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as a line of search.csv."""
    recipe = _chosen(work.recipe, trial.params)
    noted = {key: trial.user_attrs[key] for key in ("val_loss", "epochs", "seconds")}
    measured = {f"val_{work.learner_class.measure}": trial.value, **noted, "state": trial.state.name.lower()}
    return {"lr": recipe.lr, "k": recipe.k, "budget": recipe.budget, "drop_path": recipe.drop_path, **measured}


def _line(row: dict[str, Any]) -> str:
    told = {key: f"{value:.4g}" if isinstance(value, int | float) else value for key, value in row.items()}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)


class Judge(Checkpoint):
    """Tells the study every epoch's validation, and ends a trial that is hopeless or late.

    A Checkpoint, since these run after the module has added its line to the history.
    """

    def __init__(self, trial: Trial, ends: float) -> None:
        self.trial, self.ends = trial, ends
        self.pruned = False

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """One value of the curve."""
        assert isinstance(module, Learner)
        entry = module.history[-1]
        self.trial.report(entry[f"val_{module.measure}"], int(entry["epoch"]))
        last = len(module.history) == trainer.max_epochs
        if not last and (self.trial.should_prune() or time.perf_counter() > self.ends):
            self.pruned = trainer.should_stop = True


def _try(work: Work, study: Study, shared: Shared, started: float) -> None:
    """One short run from a fresh backbone, kept in the study."""
    trial, seconds = study.ask(), work.recipe.search_seconds
    late = math.inf if seconds is None or not study.complete else started + seconds - study.seconds
    judge = Judge(trial, late)
    short = work.renewed(_short(work.recipe, trial.params))
    module = short.learner(lambda learner: _tuner(short, learner, shared))
    begin(short, module)
    stages = [Stages(short)] if short.recipe.stages > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(short.recipe, Path(folder), callbacks=[*stages, judge], quiet=True)
        try:
            trainer.fit(module)
            if trainer.interrupted:
                raise KeyboardInterrupt
        except NonFiniteLoss:
            study.tell(trial, 0.0, pruned=False, val_loss=None, **_spent(module, started))
            return
        except SystemExit:  # how Lightning ends after Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    assert module.best is not None
    best = module.best
    study.tell(trial, best[module.measure], pruned=judge.pruned, val_loss=best["loss"], **_spent(module, started))


def _spent(module: Learner, started: float) -> dict[str, float]:
    return {"epochs": len(module.history), "seconds": time.perf_counter() - started}


def _tuner(short: Work, learner: Learner, shared: Shared) -> Tuner:
    run, method = Share(short, learner.trainer.strategy.root_device), method_of(short)
    if method.prepare is None:
        return method.attach(run, None)
    if shared.scores is not None:
        return method.attach(run, method.prepare(run, shared.scores))
    if not shared.prepared:
        shared.prepared.append(method.prepare(run, None))
    return method.attach(run, shared.prepared[0])
