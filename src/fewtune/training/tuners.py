"""From a recipe's method to a tuner: what is trained, and how it is found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fewtune.data import Split
from fewtune.methods.choosing import SPT_RANK, tuner_for
from fewtune.methods.linear import Features, fit_probe, head_features, linear, linear_head
from fewtune.methods.spt import SPT, Structure
from fewtune.methods.spt_plan import plan, sensitivity
from fewtune.neurons import describe
from fewtune.selection import Selection
from fewtune.training.folder import RunFolder
from fewtune.training.loaders import image_loader
from fewtune.training.probabilities import pick_device
from fewtune.training.progress import shown
from fewtune.training.selecting import choose
from fewtune.tuning import attach

if TYPE_CHECKING:
    from fewtune.training.module import Learner
    from fewtune.training.protocol import ImageWork
    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


def make_tuner(work: Work, folder: RunFolder, learner: Learner) -> Any:
    """The tuner of a recipe's method, once the processes are connected.

    What is found in training images (gps: the selection; spt: where the budget goes) all processes find together, each
    in its share; the main one saves it, and all, like resumed runs, read it.
    """
    strategy = learner.trainer.strategy

    def found(make: Callable[[], Any], kind: type) -> Any:
        if strategy.broadcast(not folder.selection.exists()):
            result = make()
            if strategy.is_global_zero:
                result.save(folder.selection)
            strategy.barrier("selection")
        return kind.load(folder.selection)  # type: ignore[attr-defined]

    return tuner_for(
        work.recipe,
        work.backbone.model,
        work.backbone.head,
        original=work.fresh_model,
        selection=lambda: _told(found(lambda: _selection(work, strategy), Selection)),
        plan=lambda: found(lambda: spt_plan(work, learner), SPT),
    )


def _selection(work: Work, strategy: Any) -> Selection:
    if work.recipe.selection is not None:
        return Selection.load(work.recipe.selection)
    share = {"world": getattr(strategy, "world_size", 1), "rank": strategy.global_rank}
    return choose(work.recipe, work.score(strategy.root_device, **share))


def _told(selection: Selection) -> Selection:
    log.info("%s connections; %s trained parameters", f"{selection.connections:,}", f"{selection.trained:,}")
    return selection


def spt_plan(work: Work, learner: Learner) -> SPT:
    """Where SPT's budget goes, by the task's own loss on the first training batches."""
    recipe, model = work.recipe, work.backbone.model.to(learner.trainer.strategy.root_device)
    anatomy = describe(model, work.backbone.head)
    batches = ((images, targets) for images, targets, _ in learner.train_dataloader())
    scores = sensitivity(model, batches, anatomy, lambda _, images, targets: learner.loss(images, targets))
    structure: Structure = "lora" if recipe.method == "spt-lora" else "adapter"
    found = plan(scores, model, anatomy, structure=structure, budget=recipe.spt_budget, rank=recipe.rank or SPT_RANK)
    single = sum(map(len, found.places.values()))
    log.info("%d layers have a branch, %s connections are trained themselves", len(found.structured), f"{single:,}")
    return found


def fit_linear(work: ImageWork) -> tuple[Any, dict[str, Any]]:
    """Fit the probe, put it into the model's head; the tuner, and how the regularisation was chosen."""
    model, head = work.backbone.model, work.backbone.head
    layer, device = linear_head(model, head), pick_device(work.recipe.accelerator)
    model.to(device)
    tuner = attach(model, linear(model, head))

    def features(split: Split, text: str) -> Features:
        loader = image_loader(work.evaluated(split), work.recipe.batch_size, workers=work.recipe.workers)
        return head_features(model, layer, shown(loader, text, len(loader)), device)

    train, held_out = features(work.data.train, "features"), work.data.val
    val = None if held_out is None else features(held_out, "validation features")
    probe = fit_probe(train, val, work.data.num_classes, work.recipe.regularisation)
    with torch.no_grad():
        layer.weight.copy_(probe.weight)
        layer.bias.copy_(probe.bias)
    tuner.sync()
    chosen: dict[str, Any] = {"regularisation": probe.regularisation}
    if val is not None:
        chosen["accuracy"] = probe.accuracies[probe.regularisation]
        chosen["tried"] = {f"{c:g}": accuracy for c, accuracy in probe.accuracies.items()}
        chosen["losses"] = {f"{c:g}": loss for c, loss in probe.losses.items()}
    return tuner, chosen
