"""One short run of a search: what it shares with the others, how it is judged, and what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from fewtune.config import Recipe
from fewtune.importance import Scores
from fewtune.methods import Tuner
from fewtune.methods.base import Prepared
from fewtune.training.learner import Learner, NonFiniteLoss
from fewtune.training.loaders import pick_device
from fewtune.training.stages import Stages
from fewtune.training.trainer import build_trainer, run_trainer
from fewtune.training.tuners import Share, begin, method_of, score
from fewtune.training.work import Work

Params = Mapping[str, float]
"""What is searched: setting -> value."""
Hopeless = Callable[[int, float], bool]
"""(epoch, what validation measured) -> whether the run shall end."""


@dataclass(frozen=True)
class Shared:
    """What all trials share: scores of the connections, or whatever else a method prepares from the images."""

    scores: Scores | None = None
    prepared: Prepared | None = None

    @classmethod
    def of(cls, work: Work) -> Shared:
        """One pass over the training images, where the method makes one."""
        method = method_of(work)
        if method.score is not None:
            return cls(scores=score(work))
        if method.prepare is not None:
            return cls(prepared=method.prepare(Share(work, pick_device(work.recipe.accelerator)), None))
        return cls()


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    value: what validation measured of the best epoch; 0 where the loss was not finite. loss: of the same epoch. pruned:
    whether it ended early. seconds: from the moment at which it had its place.
    """

    value: float
    loss: float | None
    pruned: bool
    epochs: int
    seconds: float


class Judge(Checkpoint):
    """Tells every epoch's validation, and ends a trial that is hopeless.

    A Checkpoint, since these run after the module has added its line to the history.
    """

    def __init__(self, hopeless: Hopeless) -> None:
        self.hopeless = hopeless
        self.pruned = False

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """One value of the curve."""
        assert isinstance(module, Learner)
        entry = module.history[-1]
        hopeless = self.hopeless(int(entry["epoch"]), entry[f"val_{module.measure}"])
        if hopeless and len(module.history) < (trainer.max_epochs or 0):
            self.pruned = trainer.should_stop = True


def chosen(recipe: Recipe, params: Params) -> Recipe:
    """The recipe with the settings of a trial."""
    budget = None if "k" in params else recipe.budget
    return recipe.changed(**{**params, "budget": budget})


def short(recipe: Recipe, params: Params) -> Recipe:
    """The recipe of a trial."""
    share = -(-recipe.warmup * recipe.search_epochs // recipe.epochs)  # of the warm-up, rounded up
    return chosen(recipe, params).changed(
        epochs=recipe.search_epochs, warmup_epochs=min(share, recipe.search_epochs - 1), devices=1, strategy="auto",
        stop_after=None,
    )  # fmt: skip


def try_out(work: Work, params: Params, shared: Shared, hopeless: Hopeless) -> Outcome:
    """One short run from a fresh backbone."""
    started, judge = time.perf_counter(), Judge(hopeless)
    run = work.renewed(short(work.recipe, params))
    module = run.learner(lambda learner: _tuner(run, learner, shared))
    begin(run, module)
    stages = [Stages(run)] if run.recipe.stages > 1 else []

    def outcome(value: float, loss: float | None) -> Outcome:
        return Outcome(value, loss, judge.pruned, len(module.history), time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(run.recipe, Path(folder), callbacks=[*stages, judge], quiet=True)
        try:
            run_trainer(trainer, module, run.recipe)
        except NonFiniteLoss:
            return outcome(0.0, None)
    assert module.best is not None
    return outcome(module.best[module.measure], module.best["loss"])


def _tuner(run: Work, learner: Learner, shared: Shared) -> Tuner:
    share, method = Share(run, learner.trainer.strategy.root_device), method_of(run)
    if shared.scores is None:
        return method.attach(share, shared.prepared)
    assert method.prepare is not None
    return method.attach(share, method.prepare(share, shared.scores))
