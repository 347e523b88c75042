"""Where in a model the selected connections lie."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from fewtune.errors import SelectionError, nearest
from fewtune.selection import Selection


@dataclass(frozen=True)
class Located:
    """One part of a model: its selected connections, their share of all selected ones, its share of all neurons."""

    connections: int
    share: float
    share_of_neurons: float


def located(selection: Selection, parts: Mapping[str, str]) -> dict[str, Located]:
    """How the selected connections are spread over parts of the model.

    With the same K for every neuron, ``share`` and ``share_of_neurons`` agree; a selection over the whole network goes
    where the scores are large.

    Args:
        selection: of any granularity.
        parts: name of a part -> glob pattern of its weights' names, such as {"block 1": "blocks.0.*"}. Weights that
            no pattern matches are gathered under "elsewhere".

    Raises:
        SelectionError: no connections, a pattern that matches no weight, or a weight that two patterns match.
    """
    if not selection.connections:
        raise SelectionError("the selection has no connections, so they lie nowhere")
    views = selection.anatomy.views
    weights: dict[str, list[str]] = {part: fnmatch.filter(views, pattern) for part, pattern in parts.items()}
    if unmatched := [part for part, names in weights.items() if not names]:
        pattern = parts[unmatched[0]]
        raise SelectionError(f"no weight matches {pattern!r} of {unmatched[0]!r}{nearest(pattern, views)}")
    owner: dict[str, str] = {}
    for part, names in weights.items():
        for name in names:
            if name in owner:
                raise SelectionError(f"{name} belongs to {owner[name]!r} and to {part!r}; expected one part")
            owner[name] = part
    if rest := [name for name in views if name not in owner]:
        weights["elsewhere"] = rest
    counts, neurons = selection.per_layer(), sum(view.neurons for view in views.values())
    return {
        part: Located(
            chosen := sum(counts[name] for name in names),
            chosen / selection.connections,
            sum(views[name].neurons for name in names) / neurons,
        )
        for part, names in weights.items()
    }
