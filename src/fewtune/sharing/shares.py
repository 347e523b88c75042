"""Which connections tasks share, and which of the rest are a task's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fewtune.importance import Scores
from fewtune.neurons import Anatomy, Places
from fewtune.selection import Granularity, Selection


def summed_ranks(scores: Iterable[Scores], anatomy: Anatomy, granularity: Granularity) -> Scores:
    """The sum over tasks of their scores' ranks, each in (0, 1], so that no task outweighs another by its scale.

    Ranks are taken among what competes for a place: a neuron's connections, a layer's, or the network's.

    Args:
        scores: of every task on the same backbone.
        anatomy: of the model that is to be selected from; its head may differ from those that were scored.
    """
    total: dict[str, Tensor] = {}
    for one in scores:
        for name, rank in _ranks(one, granularity).items():
            total[name] = total[name] + rank if name in total else rank
    return Scores(total, anatomy)


def _ranks(scores: Scores, granularity: Granularity) -> dict[str, Tensor]:
    views = scores.anatomy.views
    matrices = {name: views[name].matrix(score).float() for name, score in scores.items()}
    if granularity == "network":
        together = _rank(torch.cat([matrix.reshape(1, -1) for matrix in matrices.values()], dim=1))
        parts = together.split([matrix.numel() for matrix in matrices.values()], dim=1)
        ranks = {name: part.view_as(matrices[name]) for name, part in zip(matrices, parts, strict=True)}
    elif granularity == "layer":
        ranks = {name: _rank(matrix.reshape(1, -1)).view_as(matrix) for name, matrix in matrices.items()}
    else:
        ranks = {name: _rank(matrix) for name, matrix in matrices.items()}
    return {name: views[name].stored(rank).contiguous() for name, rank in ranks.items()}


def _rank(rows: Tensor) -> Tensor:
    """1 for the largest of each row of [rows, n], 1/n for the smallest; of equals the first is the larger."""
    place = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rows.shape[1] - place) / rows.shape[1]


def rest_of(scores: Scores, shared: Selection) -> Scores:
    """The scores of what is not shared: 0 at shared connections; weights of which nothing is left have none."""
    views, rest = scores.anatomy.views, {}
    for name, score in scores.items():
        matrix = views[name].matrix(score).clone()
        if name in shared.places:
            matrix[shared.places[name].mask().to(matrix.device)] = 0
        if bool(matrix.any()):
            rest[name] = views[name].stored(matrix).contiguous()
    return Scores(rest, scores.anatomy)


def without(selection: Selection, shared: Selection) -> Selection:
    """A selection less the shared connections, which a neuron with few connections may have been filled up with."""
    places = {}
    for name, chosen in selection.places.items():
        flat = chosen.flat
        if name in shared.places:
            flat = flat[~torch.isin(flat, shared.places[name].flat, assume_unique=True)]
        if len(flat):
            places[name] = Places(chosen.neurons, chosen.fan_in, flat)
    return replace(selection, places=places)
