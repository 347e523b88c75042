"""What the tests of selections share: a model with four kinds of weights, and scores of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewtune.importance import Scores
from fewtune.neurons import describe
from fewtune.selection import Selection


class Net(nn.Module):
    """Fan-in 6, 27, 4 and 8: a linear layer, a convolution, a transposed one, a second linear layer; norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 5, 3)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
        self.table = nn.Parameter(torch.zeros(7))
        self.head = nn.Linear(3, 2)


SHAPES = {"first.weight": (4, 6), "conv.weight": (5, 27), "up.weight": (6, 4), "block.1.weight": (3, 8)}


CONNECTIONS = 24 + 135 + 24 + 24


ANATOMY = describe(Net(), "head")


def scores_of(values: dict[str, Tensor] | None = None, seed: int = 0) -> Scores:
    """Scores of a `Net` with matrices of `SHAPES`; random ones where none are given."""
    generator = torch.Generator().manual_seed(seed)
    values = values or {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return Scores({name: ANATOMY.views[name].stored(value) for name, value in values.items()}, ANATOMY)


def matrices_of(scores: Scores) -> dict[str, Tensor]:
    return {name: scores.anatomy.views[name].matrix(score) for name, score in scores.items()}


def counts_of(selection: Selection, name: str) -> list[int]:
    """Connections of every neuron."""
    places = selection.places[name]
    return torch.bincount(places.rows, minlength=places.neurons).tolist()


def mask_of(selection: Selection, name: str) -> Tensor:
    places = selection.places.get(name)
    return torch.zeros(SHAPES[name], dtype=torch.bool) if places is None else places.mask()
