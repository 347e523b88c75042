"""Learning rate x K (x drop path), each pair one short run judged on validation images; the test set is not read."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.importance import Scores
from fewtune.methods import Tuner
from fewtune.methods.base import Prepared
from fewtune.training.learner import Learner, NonFiniteLoss
from fewtune.training.trainer import build_trainer, duration
from fewtune.training.tuners import Share, method_of, score

if TYPE_CHECKING:
    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class SearchResult:
    """The recipe with the best pair, and a row for every pair that was tried."""

    best: Recipe
    rows: list[dict[str, Any]]


def search_recipe(work: Work) -> SearchResult:
    """Try every pair for `search_epochs` epochs; the best by validation accuracy (or what else the
    task measures), of equals by the lower loss.

    A method that selects by scores is scored once, and each K selects from these; what another method prepares from
    the images is prepared once too, by the first run. Only the former has a K. A pair whose loss is not finite loses.
    Raises ConfigError where there is nothing to search, or in a run of several processes.
    """
    recipe, method = work.recipe, method_of(work)
    if not method.trains_by_epochs(recipe.task):
        raise ConfigError(f"method={method.name} has no learning rate or K to search; leave --search out")
    if recipe.train_on != "train":
        raise ConfigError("--search judges on validation images; leave train_on=train+val out")
    if recipe.num_nodes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--search runs in one process; search on one machine, then train with its result")
    scores = None
    if method.score is not None:
        if recipe.selection is not None:
            raise ConfigError("--search makes selections of its own; leave selection= out")
        scores = score(work)
    kept: list[Prepared] = []  # what does not depend on what is searched, prepared by the first run
    rows, candidates, started = [], list(_candidates(recipe, method.score is not None)), time.perf_counter()
    for number, candidate in enumerate(candidates, 1):
        rows.append({**_searched(candidate), **_try(work, candidate, scores, kept), "epochs": candidate.epochs})
        log.info("search %d of %d: %s", number, len(candidates), _line(rows[-1]))
        if number == 1 and len(candidates) > 1:
            rest = (time.perf_counter() - started) * (len(candidates) - 1)
            log.info("about %s for the rest of the search", duration(rest))
    measured = f"val_{work.learner_class.measure}"
    best = max(range(len(rows)), key=lambda i: (rows[i][measured], -rows[i]["val_loss"]))
    log.info("best: %s", _line(rows[best]))
    return SearchResult(recipe.changed(**_searched(candidates[best])), rows)


def _candidates(recipe: Recipe, selects: bool) -> Iterator[Recipe]:
    ks: tuple[float | None, ...] = recipe.search_k if selects else (recipe.k,)
    drops = recipe.search_drop_path or (recipe.drop_path,)
    share = -(-recipe.warmup * recipe.search_epochs // recipe.epochs)  # of the warm-up, rounded up
    short = {"epochs": recipe.search_epochs, "warmup_epochs": min(share, recipe.search_epochs - 1)}
    for k, lr, drop_path in itertools.product(ks, recipe.search_lr, drops):
        budget = None if selects else recipe.budget
        yield recipe.changed(
            k=k, budget=budget, lr=lr, drop_path=drop_path, devices=1, strategy="auto", stop_after=None, **short
        )


def _searched(recipe: Recipe) -> dict[str, Any]:
    return {"lr": recipe.lr, "k": recipe.k, "budget": recipe.budget, "drop_path": recipe.drop_path}


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None)


def _try(work: Work, recipe: Recipe, scores: Scores | None, kept: list[Prepared]) -> dict[str, float]:
    """What validation measured, and its loss, of one short run from a fresh backbone."""
    short, method = work.renewed(recipe), method_of(work)

    def tuner(learner: Learner) -> Tuner:
        run = Share(short, learner.trainer.strategy.root_device)
        if method.prepare is None:
            return method.attach(run, None)
        if scores is not None:
            return method.attach(run, method.prepare(run, scores))
        if not kept:
            kept.append(method.prepare(run, None))
        return method.attach(run, kept[0])

    assert work.data.val is not None
    module = short.learner(tuner)
    measured = f"val_{module.measure}"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, Path(folder), callbacks=[], quiet=True)
        try:
            trainer.fit(module)
        except NonFiniteLoss:
            return {measured: 0.0, "val_loss": float("inf")}
        except SystemExit:  # how Lightning ends after Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    assert module.best is not None
    return {measured: module.best[module.measure], "val_loss": module.best["loss"]}
