"""What a delta consists of: the numbers that a task changed, and how its backbone is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fewtune.delta.fingerprint import Fingerprint, fast_positions
from fewtune.files import Json
from fewtune.selection import Selection


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a `fewtune.delta.Delta`, whose docstring describes them."""

    choice: Selection
    values: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    fingerprint: Fingerprint
    metadata: Json = field(default_factory=dict)
    quantised: Mapping[str, str] = field(default_factory=dict)

    def selection(self) -> Selection:
        """The selection that was tuned."""
        return self.choice

    @property
    def connections(self) -> int:
        """Number of selected connections."""
        return self.choice.connections

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return self.choice.trained

    def per_layer(self) -> dict[str, int]:
        """Weight name -> number of its selected connections."""
        return self.choice.per_layer()

    def summary(self) -> str:
        """A table of what was trained."""
        return self.choice.summary()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Contents):
            return NotImplemented
        mine, theirs = ({**d.values, **d.whole, **d.buffers} for d in (self, other))
        return (
            self.choice == other.choice
            and self.fingerprint == other.fingerprint
            and self.metadata == other.metadata
            and self.quantised == other.quantised
            and mine.keys() == theirs.keys()
            and all(t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in mine.items())
        )

    def __hash__(self) -> int:
        return hash((self.choice, self.fingerprint))

    def __repr__(self) -> str:
        return f"<Delta: {self.choice.connections:,} connections, {len(self.whole)} tensors trained whole>"

    @cached_property
    def positions(self) -> dict[str, Tensor | None]:
        """Flat positions in the stored tensor that are overwritten, by name; None: all of it."""
        views = self.choice.anatomy.views
        weights = {name: views[name].stored_index(places.flat) for name, places in self.choice.places.items()}
        return weights | dict.fromkeys((*self.whole, *self.buffers))

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the head's parameters."""
        return {name: self.choice.anatomy.shapes[name] for name in self.choice.head}

    def new(self, name: str) -> Tensor:
        """The new values of a tensor that the delta overwrites."""
        return next(group[name] for group in (self.values, self.whole, self.buffers) if name in group)

    @cached_property
    def fast_positions(self) -> dict[str, Tensor | None]:
        """Flat positions of the backbone's tensors at which the fast fingerprint looks; None: all."""
        return fast_positions(self.fingerprint.tensors, self.positions)
