"""What a task changed in a backbone, and how it is applied, reverted and swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.delta.applying import Verify, applied, apply_delta, forget, revert_delta, swap_delta
from fewtune.delta.fingerprint import Fingerprint, fast_positions
from fewtune.selection import Selection


@dataclass(frozen=True, eq=False)
class Delta:
    """A task: new values of the selected connections, new tensors for what was trained whole. Not to be changed.

    Made by `take` (or ``tuner.delta()``) and `load_delta`.

    Attributes:
        choice: what was tuned.
        values: weight name -> new values, 1-D, in the order of the selection's places.
        whole: parameter name -> new tensor, for biases, scales and head.
        buffers: buffer name -> new tensor, where running statistics were trained.
        fingerprint: of the backbone.
        metadata: what its maker noted: JSON values by name.
    """

    choice: Selection
    values: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    fingerprint: Fingerprint
    metadata: dict[str, Any] = field(default_factory=dict)

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

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the delta as one safetensors file, whole or not at all.

        Args:
            path: the file; its folder must exist.
            dtype: ``torch.float16`` or ``torch.bfloat16`` rounds all numbers to half the bytes; None loses nothing.

        Raises:
            DeltaError: another dtype, values beyond its range, metadata that is no JSON, or the file cannot be written.
        """
        from fewtune.delta.format import to_bytes, write_file

        write_file(Path(path), to_bytes(self, dtype))

    def apply(self, model: nn.Module, verify: Verify = "fast") -> None:
        """Writes the task into a model of the same backbone and keeps in memory what it overwrites.

        All checks come before the first write. Values are cast to the model's dtype; `revert` is exact in it.

        Args:
            model: the backbone with a head of the task's shape, in any floating dtype, on any device.
            verify: "fast" looks at every place to be overwritten and a sample of the rest (milliseconds), "full" at
                all of the backbone, "none" only at names and shapes.

        Raises:
            DeltaError: another backbone, another head, a delta is applied already, or a selection is attached. The
                model is unchanged.
        """
        apply_delta(model, self, verify)

    def revert(self, model: nn.Module) -> None:
        """Writes back, bit for bit, what `apply` overwrote in this process.

        Raises:
            DeltaError: this delta is not applied to the model, or the model's weights were changed since. (Then what
                was kept is of no use any more and is forgotten: load the backbone's weights again.)
        """
        revert_delta(model, self)

    def swap(self, model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
        """Replaces this delta, applied to the model, by another one of the same backbone.

        Raises:
            DeltaError: as `revert` and `apply`; where the new one cannot be applied, this one stays.
        """
        swap_delta(model, self, new, verify)

    @contextmanager
    def applied_to(self, model: nn.Module, verify: Verify = "fast") -> Iterator[nn.Module]:
        """A context in which the delta is applied; it is reverted at the end, after an exception too."""
        self.apply(model, verify)
        try:
            yield model
        finally:
            self.revert(model)

    def merge(self, model: nn.Module, verify: Verify = "fast") -> None:
        """Writes the task into a model for good: `apply`, but nothing is kept and the model is plain afterwards."""
        self.apply(model, verify)
        forget(model)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        mine, theirs = ({**d.values, **d.whole, **d.buffers} for d in (self, other))
        return (
            self.choice == other.choice
            and self.fingerprint == other.fingerprint
            and self.metadata == other.metadata
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

    def new(self, name: str) -> Tensor:
        """The new values of a tensor that the delta overwrites."""
        return next(group[name] for group in (self.values, self.whole, self.buffers) if name in group)

    @cached_property
    def fast_positions(self) -> dict[str, Tensor | None]:
        """Flat positions of the backbone's tensors at which the fast fingerprint looks; None: all."""
        return fast_positions(self.fingerprint.tensors, self.positions)


def swap(model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
    """Replaces the delta that is applied to the model, or applies ``new`` where none is; see `Delta.swap`."""
    present = applied(model)
    if present is None:
        new.apply(model, verify)
    else:
        present.swap(model, new, verify)
