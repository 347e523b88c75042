"""How selections of several tasks or seeds overlap, beside what independent random choices would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import nan, sqrt

import torch
from torch import Tensor

from fewtune.errors import SelectionError
from fewtune.neurons import View
from fewtune.selection import Selection


@dataclass(frozen=True)
class Shared:
    """How far two selections A and B of one model share their connections.

    ``shared``: |A and B| / min(|A|, |B|). ``chance``: its mean, and ``chance_std`` its standard deviation, for
    independent uniform choices that take as many connections of each neuron as A and B do.
    """

    first: str
    second: str
    shared: float
    chance: float
    chance_std: float

    @property
    def above_chance(self) -> float:
        """How far from chance (0) to complete (1); below 0 where less is shared than by chance. NaN if chance is 1."""
        return (self.shared - self.chance) / (1 - self.chance) if self.chance < 1 else nan


def sharing(selections: Mapping[str, Selection]) -> list[Shared]:
    """Every pair of the named selections, in their order.

    Chance: of a neuron's N connections A takes a and B takes b, so that the number in both is hypergeometric, with
    mean a b / N and variance a b (N - a) (N - b) / (N^2 (N - 1)); neurons are independent.

    Raises:
        SelectionError: less than two selections, one without connections, or selections of different models.
    """
    if len(selections) < 2:
        raise SelectionError(f"got {len(selections)} selections; expected two or more to compare")
    if empty := [name for name, selection in selections.items() if not selection.connections]:
        raise SelectionError(f"the selection {empty[0]} has no connections, so it shares none")
    return [_pair(*pair) for pair in combinations(selections.items(), 2)]


def sharing_by_layer(first: Selection, second: Selection) -> dict[str, Shared]:
    """`sharing` of two selections for every weight from which both select, by weight name."""
    both = [name for name in first.places if name in second.places]
    one_layer = {name: [replace(s, places={name: s.places[name]}) for s in (first, second)] for name in both}
    return {name: _pair(("first", a), ("second", b)) for name, (a, b) in one_layer.items()}


def chosen_by(selections: Mapping[str, Selection]) -> list[tuple[float, float]]:
    """Of all connections that any of n selections chose, the shares chosen by exactly 1, 2, ... n of them.

    Returns:
        n pairs (observed, chance); each column sums to 1. Chance: the ratio of expected numbers for independent
        uniform choices that take as many connections of each neuron.

    Raises:
        SelectionError: as `sharing`.
    """
    sharing(dict(list(selections.items())[:2]))  # two at least
    first, *others = selections.values()
    for other in others:
        first.overlap(other)  # of the same model, or a SelectionError
    n = len(selections)
    observed, chance = torch.zeros(n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
    for name, view in first.anatomy.views.items():
        flats = [s.places[name].flat if name in s.places else _NONE for s in selections.values()]
        times = torch.cat(flats).unique(return_counts=True)[1]
        observed += torch.bincount(times, minlength=n + 1).double()
        chance += _expected([_counts(s, name, view) for s in selections.values()], view.fan_in)
    pairs = zip((observed[1:] / observed[1:].sum()).tolist(), (chance[1:] / chance[1:].sum()).tolist(), strict=True)
    return list(pairs)


_NONE = torch.empty(0, dtype=torch.int64)


def _pair(a: tuple[str, Selection], b: tuple[str, Selection]) -> Shared:
    (first, one), (second, other) = a, b
    overlap = one.overlap(other)
    variance = 0.0
    for name in one.places.keys() & other.places.keys():
        view = one.anatomy.views[name]
        variance += float(_variance(_counts(one, name, view), _counts(other, name, view), view.fan_in).sum())
    smaller = min(one.connections, other.connections)
    return Shared(first, second, overlap.shared, overlap.chance_shared, sqrt(variance) / smaller)


def _variance(a: Tensor, b: Tensor, n: int) -> Tensor:
    """Variance of the hypergeometric number of common connections of each neuron, of fan-in n."""
    return a * b * (n - a) * (n - b) / (n**2 * (n - 1)) if n > 1 else torch.zeros_like(a)


def _counts(selection: Selection, name: str, view: View) -> Tensor:
    """Selected connections of every neuron of a weight, [neurons], float64."""
    places = selection.places.get(name)
    rows = _NONE if places is None else places.rows
    return torch.bincount(rows, minlength=view.neurons).double()


def _expected(counts: list[Tensor], fan_in: int) -> Tensor:
    """Expected connections of a weight that exactly 0, 1, ... n independent choices take (Poisson binomial)."""
    chance = torch.zeros(len(counts) + 1, len(counts[0]), dtype=torch.float64)
    chance[0] = 1
    for taken in counts:
        p = taken / fan_in
        once_more = torch.roll(chance, 1, dims=0)
        once_more[0] = 0
        chance = chance * (1 - p) + once_more * p
    return fan_in * chance.sum(dim=1)
