"""Scores by a weight and the size of its input: a forward pass only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.importance.columns import ColumnSums
from fewtune.importance.passes import Progress, left_as_found, over_batches, reduce_over_processes
from fewtune.importance.prepared import check_count, scoring_of
from fewtune.importance.scores import Scores, require_whole
from fewtune.neurons import ASK_MODEL, HeadSpec, Role
from fewtune.quantised import seen_dequantised


@seen_dequantised
def wanda_importance(
    model: nn.Module,
    loader: Iterable[Any],
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
    exclude: Iterable[str] = (),
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    r"""How much of a neuron's output a connection carries (Wanda: Sun et al. 2024, Eq. 1).

    .. math:: s_{ij} = |W_{ij}| \, \sqrt{\tfrac{1}{N} \textstyle\sum_n X_{nj}^2}

    The norm of the column X_j over all positions n (images, tokens, output pixels), divided by the root of their number
    N, so that layers which see more positions are not preferred. Labels and gradients are not used. With granularity
    "columns", columns are chosen by norm(W_j) rms(X_j).

    Args:
        model, loader, head, roles, exclude, limit, progress: as in `gradient_importance`.

    Raises:
        ImportanceError: an empty loader, or one that yields something else; scores that are not finite; a weight that
            gets scores is never given to a linear or convolution function.
        SelectionError: a pattern of ``exclude`` matches no module, or nothing is left.
        ModelError: ``head`` names no module.
    """
    check_count("limit", limit)
    anatomy, weights = scoring_of(model, head, roles, exclude)
    require_whole(weights, "wanda_importance")
    columns = ColumnSums(weights, anatomy.views, gradients=False)
    with left_as_found(model, False), torch.no_grad(), columns:
        over_batches(model, loader, _forward, limit, None, progress)
    columns.check("wanda")
    columns.reduced(reduce_over_processes)
    scores = {name: (w.detach().abs() * columns.moments(name)[1].sqrt()) for name, w in weights.items()}
    wide = {name: torch.promote_types(w.dtype, torch.float32) for name, w in weights.items()}
    return Scores({name: score.to(wide[name]) for name, score in scores.items()}, anatomy)


def _forward(model: nn.Module, inputs: Any, labels: Tensor) -> None:
    for view in inputs if isinstance(inputs, (tuple, list)) else (inputs,):
        model(view)
