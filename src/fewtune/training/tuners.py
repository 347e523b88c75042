"""From a recipe's method to a tuner: what is trained, and how it is found."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from fewtune.data import Split
from fewtune.methods.bias import bias
from fewtune.methods.full import Full
from fewtune.methods.linear import Features, fit_probe, head_features, linear, linear_head
from fewtune.selection import Selection
from fewtune.training.folder import RunFolder
from fewtune.training.loaders import image_loader
from fewtune.training.probabilities import pick_device
from fewtune.training.progress import shown
from fewtune.training.selecting import choose
from fewtune.tuning import attach

if TYPE_CHECKING:
    from fewtune.training.protocol import ImageWork
    from fewtune.training.work import Work

log = logging.getLogger("fewtune")


def make_tuner(work: Work, folder: RunFolder, strategy: Any) -> Any:
    """The tuner of a recipe's method, once the processes are connected (`strategy` is Lightning's).

    For gps all processes score their shares of the images and sum the gradients; the main one saves the selection, and
    all, like resumed runs, read it.
    """
    model, head = work.backbone.model, work.backbone.head
    match work.recipe.method:
        case "full":
            return Full(model, head, original=work.fresh_model)
        case "bias":
            return attach(model, bias(model, head))
        case "linear":
            return attach(model, linear(model, head))
        case "gps":
            if strategy.broadcast(not folder.selection.exists()):
                selection = _selection(work, strategy)
                if strategy.is_global_zero:
                    selection.save(folder.selection)
                strategy.barrier("selection")
            return attach(model, _told(Selection.load(folder.selection)))


def _selection(work: Work, strategy: Any) -> Selection:
    if work.recipe.selection is not None:
        return Selection.load(work.recipe.selection)
    share = {"world": getattr(strategy, "world_size", 1), "rank": strategy.global_rank}
    return choose(work.recipe, work.score(strategy.root_device, **share))


def _told(selection: Selection) -> Selection:
    log.info("%s connections; %s trained parameters", f"{selection.connections:,}", f"{selection.trained:,}")
    return selection


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
