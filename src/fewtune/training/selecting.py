"""From a recipe and its training images to scores and a selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewtune.config import Recipe
from fewtune.data.split import Split
from fewtune.data.transforms import two_views
from fewtune.delta import load_delta
from fewtune.errors import ConfigError
from fewtune.importance import Scores, gradient_importance, magnitude_importance, random_importance
from fewtune.models import Backbone
from fewtune.objectives import CrossEntropy, SupCon
from fewtune.oracle import difference_importance
from fewtune.selection import Selection, select
from fewtune.training.folder import RunFolder
from fewtune.training.loaders import image_loader
from fewtune.training.progress import shown


def score(
    recipe: Recipe, backbone: Backbone, train: Split, device: torch.device, *, world: int = 1, rank: int = 0
) -> Scores:
    """Scores of all connections; for importance "gradient" one pass over the training images, in two views each.

    Of several processes each takes its share of the images (`world`, `rank`) and the gradients are summed, so that
    all get the same scores; each contrasts within its own batches.
    """
    without = score_without_images(recipe, backbone)
    if without is not None:
        return without
    views = train.with_transform(two_views(backbone))
    loader = image_loader(
        views, recipe.batch_size, seed=recipe.seed, shuffle=True, workers=recipe.workers, world=world, rank=rank
    )
    batches = ((images, labels) for images, labels, _ in shown(loader, "importance", len(loader)))
    objective = SupCon(recipe.temperature) if recipe.objective == "supcon" else CrossEntropy()
    return gradient_importance(backbone.model.to(device), batches, objective, backbone.head)


def score_without_images(recipe: Recipe, backbone: Any) -> Scores | None:
    """Scores by an importance that looks at no image of the task; None where the recipe's does.

    `backbone` is anything with `model` and `head`.
    """
    match recipe.importance:
        case "magnitude":
            return magnitude_importance(backbone.model, head=backbone.head)
        case "random":
            return random_importance(backbone.model, recipe.seed, head=backbone.head)
        case "oracle":
            return difference_importance(backbone.model, oracle_weights(recipe, backbone), head=backbone.head)
        case "gradient":
            return None


def oracle_weights(recipe: Recipe, backbone: Any) -> dict[str, Tensor]:
    """All parameters, by name, as the recipe's `oracle`, a full fine-tuning of this backbone, left them.

    Raises:
        ConfigError: a folder without a task file, or a task file of another method.
        DeltaError: the task file is missing or damaged, or of another backbone or other classes.
    """
    assert recipe.oracle is not None
    path = Path(recipe.oracle)
    if path.is_dir():
        path = RunFolder(path).delta
        if not path.exists():
            raise ConfigError(f"oracle: {path.parent} holds no {path.name}; give the folder of a finished run")
    delta = load_delta(path)
    method = delta.metadata.get("method", "unknown")
    if method != "full":
        raise ConfigError(f"oracle: {path} is of a run with method={method}; expected one of method=full")
    with delta.applied_to(backbone.model):
        return {name: parameter.detach().clone() for name, parameter in backbone.model.named_parameters()}


def choose(recipe: Recipe, scores: Scores) -> Selection:
    """The selection that a recipe asks for."""
    return select(
        scores,
        k=recipe.per_neuron,
        budget=recipe.budget,
        granularity=recipe.granularity,
        bias=recipe.bias,
        scale=recipe.scale,
        norm=recipe.norm,
        relative_position=recipe.relative_position,
        exclude=recipe.exclude,
    )
