"""Which connections are trained: `select` and the `Selection` that it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fewtune.errors import SelectionError
from fewtune.files import read_versioned, write_versioned
from fewtune.importance import Scores
from fewtune.neurons import Anatomy, Places, Role, excluded
from fewtune.topk import granular_top_k

Granularity = Literal["neuron", "layer", "network", "columns"]
Whole = Literal["all", "none"]

FORMAT = "fewtune-selection"
VERSION = 1
MUCH = 0.1
"""A warning is given where more than this part of a backbone is of unknown role."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """How many connections two selections share, and how many two random ones would.

    Attributes:
        jaccard: connections in both, divided by connections in either.
        shared: connections in both, divided by the size of the smaller selection.
        chance_jaccard: the mean of ``jaccard`` for random selections with the same number of connections a neuron.
        chance_shared: the same for ``shared``.
    """

    jaccard: float
    shared: float
    chance_jaccard: float
    chance_shared: float


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen connections, and what is trained whole beside them. Immutable.

    ``places``: weight name -> `Places`. ``dense``: role -> names of the parameters of that role that are trained whole.
    """

    anatomy: Anatomy
    places: Mapping[str, Places]
    dense: Mapping[Role, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, places in self.places.items():
            view = self.anatomy.views.get(name)
            if view is None or (view.neurons, view.fan_in) != (places.neurons, places.fan_in):
                raise SelectionError(f"the places of {name} do not fit the model's weights")
        if not self.trained:  # without connections it may still train biases or a head: other methods do
            raise SelectionError("the selection is empty: nothing would be trained; raise k or budget")

    @cached_property
    def connections(self) -> int:
        """Number of selected connections."""
        return sum(len(places) for places in self.places.values())

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head's parameters."""
        return self.anatomy.named(Role.HEAD)

    @property
    def whole(self) -> tuple[str, ...]:
        """Names of the parameters outside the head that are trained whole."""
        return tuple(name for names in self.dense.values() for name in names)

    @cached_property
    def trained(self) -> int:
        """Number of all trained parameters: connections, what is trained whole, head."""
        return self.connections + sum(prod(self.anatomy.shapes[n]) for n in (*self.whole, *self.head))

    @property
    def fraction(self) -> float:
        """Selected connections / all connections of the backbone."""
        return self.connections / self.anatomy.connections

    def per_layer(self) -> dict[str, int]:
        """Weight name -> number of its selected connections, zero included."""
        return {name: len(self.places[name]) if name in self.places else 0 for name in self.anatomy.views}

    def overlap(self, other: Selection) -> Overlap:
        """How far this selection and another of the same model share their connections."""
        self._same_model(other)
        both = either = 0
        chance = 0.0
        for name in {**self.places, **other.places}:
            a, b = self._places(name), other._places(name)
            common = int(torch.isin(a.flat, b.flat, assume_unique=True).sum())
            both, either = both + common, either + len(a) + len(b) - common
            counts = [torch.bincount(p.rows, minlength=p.neurons).double() for p in (a, b)]
            chance += float((counts[0] * counts[1]).sum()) / a.fan_in
        total, smaller = self.connections + other.connections, min(self.connections, other.connections)
        return Overlap(both / either, both / smaller, chance / (total - chance), chance / smaller)

    def __or__(self, other: Selection) -> Selection:
        self._same_model(other)
        flats = {
            name: torch.cat([self._places(name).flat, other._places(name).flat]).unique() for name in self.anatomy.views
        }
        dense = {
            role: tuple(dict.fromkeys(self.dense.get(role, ()) + other.dense.get(role, ())))
            for role in {**self.dense, **other.dense}
        }
        return self._with(flats, dense)

    def __and__(self, other: Selection) -> Selection:
        self._same_model(other)
        flats = {}
        for name in self.anatomy.views:
            flat = self._places(name).flat
            flats[name] = flat[torch.isin(flat, other._places(name).flat, assume_unique=True)]
        dense = {role: tuple(n for n in names if n in other.dense.get(role, ())) for role, names in self.dense.items()}
        return self._with(flats, dense)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        dense, theirs = ({r: n for r, n in s.dense.items() if n} for s in (self, other))
        same = self.anatomy.shapes == other.anatomy.shapes and self.head == other.head and dense == theirs
        return same and all(self._places(n) == other._places(n) for n in {**self.places, **other.places})

    def __hash__(self) -> int:
        return hash((self.connections, self.trained))

    def _places(self, name: str) -> Places:
        view = self.anatomy.views[name]
        return self.places.get(name) or Places(view.neurons, view.fan_in, torch.empty(0, dtype=torch.int64))

    def _with(self, flats: Mapping[str, Tensor], dense: Mapping[Role, tuple[str, ...]]) -> Selection:
        views = self.anatomy.views
        places = {n: Places(views[n].neurons, views[n].fan_in, f) for n, f in flats.items() if f.numel()}
        return Selection(self.anatomy, places, dense)

    def _same_model(self, other: Selection) -> None:
        mine, theirs = ({n: view.layout for n, view in s.anatomy.views.items()} for s in (self, other))
        if mine != theirs:
            raise SelectionError("the two selections belong to different models: their weights differ")

    @property
    def warning(self) -> str | None:
        """What a user must know before training, in one line: more than a tenth of the backbone is of unknown role."""
        share = self.anatomy.unknown_share
        if share <= MUCH:
            return None
        return (
            f"{100 * share:.0f} % of the backbone is of unknown role, so that no connection of it is selected: its "
            "layers are of a kind that fewtune does not know"
        )

    def summary(self) -> str:
        """A table: selected connections of every weight, what else is trained, shares of the backbone in %."""
        views = self.anatomy.views
        width = max(map(len, views), default=0)
        lines = [f"{'weight':<{width}}  {'neurons':>8}  {'fan-in':>7}  {'selected':>9}  {'%':>8}"]
        for name, count in self.per_layer().items():
            v = views[name]
            share = 100 * count / max(1, v.neurons * v.fan_in)
            lines.append(f"{name:<{width}}  {v.neurons:>8,}  {v.fan_in:>7,}  {count:>9,}  {share:>8.3f}")
        backbone = self.anatomy.backbone_parameters
        whole = {role: sum(prod(self.anatomy.shapes[n]) for n in names) for role, names in self.dense.items()}
        lines.append(f"connections: {self.connections:,} = {100 * self.connections / backbone:.3f} % of the backbone")
        lines += [f"trained whole, {role}: {count:,}" for role, count in whole.items() if count]
        head = sum(prod(self.anatomy.shapes[n]) for n in self.head)
        lines.append(f"trained whole, head: {head:,}")
        frozen = [n for n in self.anatomy.named(Role.OTHER) if n not in self.whole]
        if frozen:
            lines.append(f"frozen, role unknown: {', '.join(frozen)} (set one with roles={{pattern: role}})")
        if self.warning:
            lines.append(f"warning: {self.warning}")
        share = 100 * (self.trained - head) / backbone
        lines.append(
            f"trained: {self.trained:,}; without the head {self.trained - head:,} = {share:.3f} % of {backbone:,}"
        )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes the selection as one safetensors file, atomically."""
        header = {
            "anatomy": self.anatomy.to_json(),
            "dense": {role.value: list(names) for role, names in self.dense.items()},
        }
        fits = {n: torch.int32 if p.neurons * p.fan_in < 2**31 else torch.int64 for n, p in self.places.items()}
        tensors = {name: places.flat.to(fits[name]) for name, places in self.places.items()}
        write_versioned(Path(path), (FORMAT, VERSION), header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Reads what `save` wrote.

        Raises:
            SelectionError: the file is missing, damaged, of another kind, or of a newer version.
        """
        header, tensors = read_versioned(Path(path), (FORMAT, VERSION), SelectionError)
        try:
            anatomy = Anatomy.from_json(header["anatomy"])
            dense = {Role(role): tuple(names) for role, names in header["dense"].items()}
            if unknown := [n for names in dense.values() for n in names if n not in anatomy.shapes]:
                raise ValueError(f"unknown parameter {unknown[0]}")
            places = {n: _checked(anatomy.views[n].neurons, anatomy.views[n].fan_in, t) for n, t in tensors.items()}
            return cls(anatomy, places, dense)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SelectionError(f"{path} is not a selection file, or it is damaged ({error})") from error


def _checked(neurons: int, fan_in: int, flat: Tensor) -> Places:
    if flat.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices of {flat.dtype}")
    flat = flat.to(torch.int64)
    increasing = flat.ndim == 1 and bool((flat[1:] > flat[:-1]).all())
    if not increasing or (flat.numel() and not 0 <= int(flat[0]) <= int(flat[-1]) < neurons * fan_in):
        raise ValueError("indices out of order or range")
    return Places(neurons, fan_in, flat)


def select(
    scores: Scores,
    k: float | None = None,
    budget: float | None = None,
    granularity: Granularity = "neuron",
    *,
    bias: Whole = "all",
    scale: Whole = "all",
    norm: Whole = "none",
    relative_position: Whole = "none",
    exclude: Iterable[str] = (),
    roles: Mapping[str, str | Role] | None = None,
) -> Selection:
    """Chooses the connections with the largest scores (Sec. 3.2).

    Args:
        scores: of `gradient_importance`, `magnitude_importance` or `random_importance`.
        k: connections of each neuron (all of a neuron that has fewer); a fractional k gives one more to the neurons
            with the largest remaining scores. Give ``k`` or ``budget``.
        budget: the fraction of the backbone's connections that are selected, in (0, 1]; biases and head not counted.
        granularity: "neuron": the top k of every neuron; "layer", "network": the largest of each layer or of all, as
            many as k per neuron would be; "columns": all neurons of a layer train the same k input columns j, those
            with the largest sum_i s_ij^2 (as in PaCA, Woo et al. 2025, which takes them at random; each group of a
            convolution has columns of its own).
        bias, scale, norm, relative_position: whether parameters of that role are trained whole.
        exclude: glob patterns of names of modules and parameters; what they match, or lies inside, is not trained.
        roles: roles set by hand: {glob pattern of parameter names: role}.

    Ties are broken by order: the first neuron, then the first connection, wins.

    Raises:
        SelectionError: an impossible k or budget, less than one connection per neuron with granularity "neuron", no
            whole number of them with "columns", a pattern that matches nothing, or an empty selection.
    """
    if not isinstance(scores, Scores):
        raise SelectionError(f"select got {type(scores).__name__}; expected the scores of an importance function")
    for option, value in {
        "bias": bias,
        "scale": scale,
        "norm": norm,
        "relative_position": relative_position,
    }.items():
        if value not in ("all", "none"):
            raise SelectionError(f"{option}={value!r}; expected 'all' or 'none'")
    if granularity not in get_args(Granularity):
        raise SelectionError(f"granularity={granularity!r}; expected 'neuron', 'layer' or 'network', or 'columns'")
    anatomy = scores.anatomy.with_roles(roles)
    left_out = excluded(anatomy, exclude)
    matrices = {n: v.matrix(scores[n]) for n, v in anatomy.views.items() if n not in left_out and n in scores}
    if not matrices:
        raise SelectionError("no weight is left to select from; exclude fewer modules")
    sets = {name: anatomy.views[name].sets for name in matrices}
    places = granular_top_k(matrices, k, budget, granularity, sets)
    if not places:
        raise SelectionError("the selection is empty: no connection is selected; raise k or budget")
    wanted = {Role.BIAS: bias, Role.SCALE: scale, Role.NORM: norm, Role.RELATIVE_POSITION: relative_position}
    dense = {
        role: tuple(n for n in anatomy.named(role) if n not in left_out)
        for role, value in wanted.items()
        if value == "all"
    }
    return Selection(anatomy, places, dense)
