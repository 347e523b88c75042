"""Where a run's selected connections lie: by block, by kind of layer, and how many input columns they touch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from fewtune.neurons import View
from fewtune.selection import Selection


@dataclass(frozen=True)
class Part:
    """Some of a model's weights together.

    Attributes:
        connections: selected ones.
        share: of all selected connections.
        touched: input columns that a selected connection reads, as a share of all ("hot columns"); a convolution's
            columns are its taps.
    """

    connections: int
    share: float
    touched: float


def by_block(selection: Selection) -> dict[str, Part]:
    """Parts by the first numbered container on the way to a weight, as `blocks.3`; others by their first name."""
    return _parts(selection, {name: _container(name) for name in selection.anatomy.views})


def by_kind(selection: Selection) -> dict[str, Part]:
    """Parts by the shape of the weight: linear, convolutions by their kernel, depthwise ones apart."""
    return _parts(selection, {name: _kind(view) for name, view in selection.anatomy.views.items()})


def _container(name: str) -> str:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _kind(view: View) -> str:
    if len(view.shape) == 2:
        return "linear"
    kernel = view.shape[2:]
    size = " x ".join(map(str, kernel))
    depthwise = view.kind == "rows" and view.fan_in == prod(kernel)
    return f"depthwise convolution {size}" if depthwise else f"convolution {size}"


def _parts(selection: Selection, groups: dict[str, str]) -> dict[str, Part]:
    counts, views = selection.per_layer(), selection.anatomy.views
    members: dict[str, list[str]] = defaultdict(list)
    for name, group in groups.items():
        members[group].append(name)
    parts = {}
    for group, names in members.items():
        connections = sum(counts[name] for name in names)
        hot = sum(selection.places[name].columns.unique().numel() for name in names if name in selection.places)
        columns = sum(views[name].fan_in for name in names)
        parts[group] = Part(connections, connections / max(1, selection.connections), hot / max(1, columns))
    return parts
