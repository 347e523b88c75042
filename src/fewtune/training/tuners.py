"""From a recipe's method to a tuner, and a run as its method sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fewtune.importance import Scores
from fewtune.methods import METHODS, gps
from fewtune.methods.base import Batch, Fitted, Method, Prepared, S, Tuner
from fewtune.methods.reach import within_reach
from fewtune.objectives import Objective
from fewtune.progress import shown
from fewtune.selection import Selection
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.run_folder import RunFolder
from fewtune.training.sharding import FullySharded

if TYPE_CHECKING:
    from fewtune.training.learner import Learner
    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class Share:
    """A run as its method sees it (`fewtune.methods.base.Run`): of several processes, one's share of the images.

    shard: shares a model's weights out among the processes, where the strategy does.
    """

    work: Work
    device: torch.device
    world: int = 1
    rank: int = 0
    shard: Callable[[nn.Module], None] | None = None

    @property
    def model(self) -> nn.Module:
        """The backbone, plain, with a new head."""
        return self.work.backbone.model

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the modules that are trained whole."""
        return self.work.backbone.head

    @property
    def seed(self) -> int:
        """Of everything random in the run."""
        return self.work.recipe.seed

    @property
    def classes(self) -> int:
        """Number of classes of the labels."""
        return self.work.classes

    @property
    def objective(self) -> Objective:
        """What importance is the gradient of."""
        return self.work.objective

    @property
    def loss(self) -> Objective:
        """The task's training loss."""
        return self.work.loss

    def settings(self, kind: type[S]) -> S:
        """The recipe, which is an instance of the settings of every method; what lies below its reach is excluded."""
        recipe = within_reach(self.work.recipe, self.model)
        assert isinstance(recipe, kind)
        return recipe

    def fresh_model(self) -> nn.Module:
        """The untouched model once more."""
        return self.work.fresh_model()

    def scored_model(self) -> nn.Module:
        """The model on its device, or a copy of which each process holds its rows there."""
        if self.shard is None:
            return self.model.to(self.device)
        model = deepcopy(self.model)
        self.shard(model)
        return model

    def scored_batches(self) -> Iterable[Batch]:
        """The training images once, or as many as the recipe scores, as importance looks at them."""
        return self._batches(self.work.scored, "importance", shuffle=True, images=self.work.recipe.scored_images)

    def training_batches(self) -> Iterable[Batch]:
        """The training images of the first epoch."""
        return self._batches(self.work.train, "training images", shuffle=True)

    def plain_batches(self, part: Literal["train", "val"]) -> Iterable[Batch] | None:
        """The images of "train" or "val", all of them in order, as they are evaluated."""
        split = self.work.data.train if part == "train" else self.work.data.val
        return None if split is None else self._batches(self.work.evaluated(split), f"features: {part}", shuffle=False)

    def _batches(self, split: Any, text: str, *, shuffle: bool, images: int | None = None) -> Iterator[Batch]:
        recipe = self.work.recipe
        share: dict[str, Any] = {"world": self.world, "rank": self.rank, "workers": recipe.workers}
        loader = image_loader(split, recipe.batch_size, seed=recipe.seed, shuffle=shuffle, **share)
        count = len(loader) if images is None else min(len(loader), -(-images // (recipe.batch_size * self.world)))
        return ((inputs, labels) for inputs, labels, _ in shown(islice(loader, count), text, count))


def method_of(work: Work) -> Method:
    """The method of a work's recipe."""
    return METHODS[work.recipe.method]


def make_tuner(work: Work, folder: RunFolder, learner: Learner) -> Tuner:
    """The tuner of a recipe's method, once the processes are connected.

    What a method prepares from training images (gps: the selection; spt: where the budget goes) all processes find
    together, each in its share; the main one saves it, and all, like resumed runs, read it.
    """
    method, strategy = method_of(work), learner.trainer.strategy
    shard = strategy.shard if isinstance(strategy, FullySharded) else None
    run = Share(work, strategy.root_device, learner.trainer.world_size, learner.trainer.global_rank, shard)
    ready: Prepared | None = None
    if method.prepare is not None:
        assert method.load is not None
        if strategy.broadcast(not folder.selection.exists()):
            fresh = method.prepare(run, None)
            if learner.trainer.is_global_zero:
                fresh.save(folder.selection)
            strategy.barrier("selection")
        ready = method.load(folder.selection)
    tuner = method.attach(run, ready)
    log.info("%s trained parameters", f"{tuner.trained:,}")
    return tuner


def begin(work: Work, learner: Learner) -> None:
    """Bring the model to where training begins, and note what the validation images say of that."""
    if (start := work.start()) is not None:
        learner.start = {"name": start.name, "validation": start.validation}


def fit_at_once(work: Work) -> Fitted:
    """Train by a method that has no epochs."""
    fit = method_of(work).fit
    assert fit is not None
    return fit.run(Share(work, pick_device(work.recipe.accelerator)))


def score(work: Work) -> Scores:
    """Scores of all connections by the recipe's criterion, through the head that training starts from."""
    if work.recipe.objective != "supcon":  # that one looks at features alone
        work.start()
    return gps.score(Share(work, pick_device(work.recipe.accelerator)))


def prepared(work: Work, scores: Scores) -> Prepared:
    """What the recipe's method works out before it trains, from scores that are known already."""
    prepare = method_of(work).prepare
    assert prepare is not None
    return prepare(Share(work, torch.device("cpu")), scores)


def choose(work: Work, scores: Scores) -> Selection:
    """The selection that the recipe asks for."""
    return gps.choose(Share(work, torch.device("cpu")).settings(gps.Settings), scores)
