"""Scores by how far the batches agree on a connection's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.importance.passes import Progress, accumulate, left_as_found, reduce_over_processes
from fewtune.importance.prepared import backward_of, check_count, scoring_of
from fewtune.importance.scores import Scores, require_whole
from fewtune.neurons import ASK_MODEL, HeadSpec, Role
from fewtune.objectives import Objective, SupCon
from fewtune.quantised import seen_dequantised


@seen_dequantised
def snr_importance(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
    exclude: Iterable[str] = (),
    train_mode: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    r"""Signal to noise of every connection's gradient over the batches.

    .. math:: s_{ij} = \Big|\sum_b g_{ij}^{(b)}\Big| \Big/ \sqrt{\sum_b \big(g_{ij}^{(b)}\big)^2}, \qquad
        g^{(b)} = \partial L_b / \partial W

    Between 0, where batches cancel, and the root of their number, where all say the same. A connection of which no
    batch has a gradient has the score 0. Two numbers a connection are kept beside a batch's gradient.

    Args:
        model, loader, objective, head, roles, exclude, train_mode, limit, progress: as in `gradient_importance`.

    Raises:
        ImportanceError: as `gradient_importance`, and where there is one batch only, which tells nothing of noise.
        SelectionError: a pattern of ``exclude`` matches no module, or nothing is left.
        ModelError: ``head`` names no module.
    """
    check_count("limit", limit)
    anatomy, weights = scoring_of(model, head, roles, exclude)
    require_whole(weights, "snr_importance")
    batches = _Batches(weights)
    with left_as_found(model, train_mode):
        accumulate(
            model,
            loader,
            objective or SupCon(),
            weights,
            backward=backward_of(objective, head, train_mode),
            limit=limit,
            settled=batches.take,
            progress=progress,
        )
    reduce_over_processes(batches.sums, weights)
    reduce_over_processes(batches.squares, weights)
    if batches.number < 2:
        raise ImportanceError("snr compares batches, and there was one; take a smaller batch, or another criterion")
    scores = {n: batches.sums[n].abs_() / batches.squares[n].sqrt_() for n in weights}
    return Scores({name: torch.where(batches.squares[name] == 0, 0.0, s) for name, s in scores.items()}, anatomy)


class _Batches:
    """Sums over batches of the gradient and of its square."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        wide = {name: torch.promote_types(w.dtype, torch.float32) for name, w in weights.items()}
        self.sums, self.squares = (
            {name: torch.zeros_like(w, dtype=wide[name], requires_grad=False) for name, w in weights.items()}
            for _ in range(2)
        )
        self.number = 0

    def take(self, done: int, gradients: Mapping[str, Tensor]) -> bool:
        """Called after every batch, with what has been summed since the last call: taken, and begun anew."""
        self.number = done
        for name, gradient in gradients.items():
            self.sums[name] += gradient
            self.squares[name] += gradient.square()
            gradient.zero_()
        return False
