"""What every pass of scoring by gradients begins with: the weights that are scored, and the backward of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fewtune.errors import ImportanceError, SelectionError
from fewtune.importance.backward import backward_at_once, backward_by_views
from fewtune.importance.passes import Backward
from fewtune.importance.scores import scored_weights
from fewtune.neurons import Anatomy, HeadSpec, Role, excluded
from fewtune.objectives import Objective, SupCon, pooled_features


class Scoring(NamedTuple):
    """A model's anatomy, and the weights outside its head that get scores, by name."""

    anatomy: Anatomy
    weights: dict[str, Tensor]


def scoring_of(
    model: nn.Module, head: HeadSpec, roles: Mapping[str, str | Role] | None, exclude: Iterable[str]
) -> Scoring:
    """The weights of a model that get scores; arguments as in `fewtune.gradient_importance`.

    Raises:
        SelectionError: a pattern of ``exclude`` matches no module, or nothing is left.
    """
    anatomy, weights = scored_weights(model, head, roles)
    left_out = excluded(anatomy, exclude)
    scored = {name: weight for name, weight in weights.items() if name not in left_out}
    if weights and not scored:
        raise SelectionError("no weight is left to select from; exclude fewer modules")
    return Scoring(anatomy, scored)


def backward_of(objective: Objective | None, head: HeadSpec, train_mode: bool) -> Backward:
    """The backward pass of an objective, the contrastive one where it is left out; by views where that is the same."""
    objective = objective if objective is not None else SupCon()
    if isinstance(objective, SupCon) and objective.features is None:
        objective = replace(objective, features=partial(pooled_features, head=head))
        return partial(backward_at_once if train_mode else backward_by_views, objective)
    return partial(backward_at_once, objective)


def check_count(option: str, value: int | None) -> None:
    """ImportanceError where a number of batches or passes is none."""
    if value is not None and (type(value) is not int or value < 1):
        raise ImportanceError(f"{option}={value!r}; expected a whole number above 0")
