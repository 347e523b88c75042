"""The budget given out bit by bit: the next part of the connections by scores of the weights as they are by then.

ID3 (Agarwal et al., TACL 2025) unmasks connections while it trains and takes none back, since which connections matter
shows only where training leads. Here the budget is given out in equal parts, and of every layer its share of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewtune.importance import Scores
from fewtune.neurons import Places
from fewtune.selection import Selection


def next_part(
    scores: Scores, select: Callable[[Scores], Selection], chosen: Selection | None, share: float
) -> Selection:
    """What is trained once so much of the budget is given out: all that was chosen before, and the next best.

    Args:
        scores: of the weights as they are.
        select: the selection of the whole budget by some scores, by neuron, layer or network.
        chosen: what is trained already; None at the beginning.
        share: the part of the whole budget, in (0, 1]; of every layer (of what the whole budget would be there).

    With ``share`` 1 the whole budget is selected: by neuron, K connections of every neuron.
    """
    whole = select(scores if chosen is None else _first(scores, chosen))
    if share >= 1:
        return whole
    places = {}
    for name, all_of_it in whole.places.items():
        before = chosen.places.get(name) if chosen is not None else None
        kept = all_of_it.flat[:0] if before is None else before.flat
        room = max(0, round(share * len(all_of_it)) - len(kept))
        left = all_of_it.flat[torch.isin(all_of_it.flat, kept, assume_unique=True, invert=True)]
        values = scores.anatomy.views[name].matrix(scores[name]).reshape(-1)[left.to(scores[name].device)]
        best = values.sort(descending=True, stable=True).indices[:room].to(left.device)
        if len(taken := torch.cat([kept, left[best]]).sort().values):
            places[name] = Places(all_of_it.neurons, all_of_it.fan_in, taken)
    return Selection(whole.anatomy, places, whole.dense)


def _first(scores: Scores, chosen: Selection) -> Scores:
    """The scores with those of the chosen connections above all others."""
    top = 2 * max(float(score.max()) for score in scores.values())
    raised = {}
    for name, score in scores.items():
        view = scores.anatomy.views[name]
        matrix: Tensor = view.matrix(score).clone()
        if name in chosen.places:
            matrix.view(-1)[chosen.places[name].flat.to(matrix.device)] = top
        raised[name] = view.stored(matrix)
    return Scores(raised, scores.anatomy)
