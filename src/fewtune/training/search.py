"""Learning rate, K and drop path by short runs judged on validation images; the test set is not read.

Optuna says what to try next and which run is hopeless (`fewtune.training.study`).
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.files import Json
from fewtune.methods.base import Method
from fewtune.progress import counted, duration
from fewtune.training.cluster import LOCAL
from fewtune.training.executors import executor_of
from fewtune.training.study import Space, Study
from fewtune.training.trial import Outcome, chosen
from fewtune.training.tuners import method_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class SearchResult:
    """The recipe with the best settings, and a row for every trial."""

    best: Recipe
    rows: list[Json]


def check_search(recipe: Recipe, method: Method) -> None:
    """ConfigError where there is nothing to search, or in a run of several processes."""
    if not method.trains_by_epochs(recipe.task):
        raise ConfigError(f"method={method.name} has no learning rate or K to search; leave --search out")
    if recipe.train_on != "train":
        raise ConfigError("--search judges on validation images; leave train_on=train+val out")
    if recipe.num_nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--search is one process; search on one machine or --on ray, then train with its result")
    if method.score is not None and recipe.selection is not None:
        raise ConfigError("--search makes selections of its own; leave selection= out")


def search_recipe(work: Work, storage: Path, on: str = LOCAL, threads: int = 1) -> SearchResult:
    """Runs of `search_epochs` epochs; the best by validation accuracy (or what else the task measures), of equals by
    the lower loss.

    The listed learning rates come first, then what Optuna's TPE draws between them. A run whose validation curve
    falls below the median of the others ends early, and is not chosen. There are `search_trials` runs, and none begins
    after `search_seconds`; a study that lies in `storage` goes on, with the seconds that it has spent.

    A method that selects by scores is scored once, and each K selects from these; what another method prepares from
    the images is prepared once too. Only the former has a K. A run whose loss is not finite counts as 0.

    Args:
        work: the run that is to be trained with what is chosen.
        storage: the study's SQLite file, which this process alone writes.
        on, threads: where the runs are done, see `fewtune.training.executors.executor_of`.

    Raises:
        ConfigError: there is nothing to search, the run is one of several processes, or there is no such place.
        MissingExtra: Optuna, or Ray where it is asked for, is not installed.
    """
    recipe, method = work.recipe, method_of(work)
    check_search(recipe, method)
    space = Space(recipe.search_lr, recipe.search_k if method.score is not None else (), recipe.search_drop_path)
    limit = recipe.search_trials or (space.size if recipe.search_seconds is None else None)
    clock = time.perf_counter()
    executor = executor_of(on, work, threads)
    try:
        with counted("search", limit) as told:
            search = _Search(work, Study(storage, space, recipe.seed), limit, told, clock)
            executor.work_off(search.offer, search.hopeless, search.done)
    finally:
        executor.close()
    best = search.study.best()
    log.info("best: %s", _line(_row(work, best)))
    return SearchResult(chosen(recipe, best.params), [_row(work, trial) for trial in search.study.done])


@dataclass
class _Search:
    """What is tried next, what is hopeless, and what is kept.

    limit: of the number of trials. told: progress. clock: when time was last added to the study's.
    """

    work: Work
    study: Study
    limit: int | None
    told: Any
    clock: float
    running: set[int] = field(default_factory=set)

    def _spent(self) -> float:
        """Seconds that the study has taken, up to now."""
        now = time.perf_counter()
        self.study.spend(now - self.clock)
        self.clock = now
        return self.study.seconds

    def offer(self) -> Trial | None:
        """Another trial: always until one is complete, then as the number and the time allow."""
        begun, seconds = len(self.study.done) + len(self.running), self.work.recipe.search_seconds
        if (self.study.complete or self.running) and (
            (self.limit is not None and begun >= self.limit) or (seconds is not None and self._spent() >= seconds)
        ):
            return None
        trial = self.study.ask()
        self.running.add(trial.number)
        return trial

    def hopeless(self, trial: Trial, epoch: int, value: float) -> bool:
        """Whether a trial is far behind, or there is no more time for it and another one is complete."""
        late, seconds = False, self.work.recipe.search_seconds
        if seconds is not None and self.study.complete:
            late = self._spent() > seconds
        return self.study.hopeless(trial, epoch, value) or late

    def done(self, trial: Trial, outcome: Outcome) -> None:
        """Keep what came of a trial, and tell it."""
        self.running.remove(trial.number)
        noted = asdict(outcome)
        ended = self.study.tell(
            trial, noted.pop("value"), pruned=noted.pop("pruned"), val_loss=noted.pop("loss"), **noted
        )
        self._spent()
        count = len(self.study.done)
        self.told(count, self.limit)
        log.info("search %d%s: %s", count, f" of {self.limit}" if self.limit else "", _line(_row(self.work, ended)))
        if count == 1 and self.limit and not self.running and self.work.recipe.search_seconds is None:
            log.info("at most about %s for the rest of the search", duration(outcome.seconds * (self.limit - 1)))


def _row(work: Work, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as a line of search.csv."""
    recipe = chosen(work.recipe, trial.params)
    noted = {key: trial.user_attrs[key] for key in ("val_loss", "epochs", "seconds")}
    measured = {f"val_{work.learner_class.measure}": trial.value, **noted, "state": trial.state.name.lower()}
    return {"lr": recipe.lr, "k": recipe.k, "budget": recipe.budget, "drop_path": recipe.drop_path, **measured}


def _line(row: dict[str, Any]) -> str:
    told = {key: f"{value:.4g}" if isinstance(value, int | float) else value for key, value in row.items()}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
