"""What a task changed in a backbone, and how it is applied, reverted and swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fewtune.delta.checks import Target, find_targets, require_finite
from fewtune.delta.entries import read, write
from fewtune.delta.fingerprint import Fingerprint, fast_positions
from fewtune.errors import DeltaError
from fewtune.selection import Selection

Verify = Literal["fast", "full", "none"]


@dataclass(frozen=True, eq=False)
class Applied:
    """What stands in a model: the delta, what it wrote, and what it overwrote, each by tensor name."""

    delta: Delta
    written: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]


# Kept beside the model, not on it: an attribute would be pickled and copied with the model. A copy of a model with a
# delta is a plain model with other weights, which every fingerprint refuses.
_applied: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Delta:
    """A task: new values of the selected connections, new tensors for what was trained whole. Not to be changed.

    Made by `take` (or ``tuner.delta()``) and `load_delta`.

    Attributes:
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
        model = _plain(model)
        if model in _applied:
            raise DeltaError(
                "a delta is already applied to this model: revert it first, or replace it with delta.swap(model, new)"
            )
        targets = find_targets(self, model)
        kept = self._verified(model, targets, verify)
        new = {name: self._new(name).to(target.tensor.device) for name, target in targets.items()}
        written = {name: new[name].reshape(-1).to(target.tensor.dtype) for name, target in targets.items()}
        require_finite(written, "in the model's dtype")
        _write_all(targets, written, kept)
        _applied[model] = Applied(self, written, kept)

    def revert(self, model: nn.Module) -> None:
        """Writes back, bit for bit, what `apply` overwrote in this process.

        Raises:
            DeltaError: this delta is not applied to the model, or the model's weights were changed since. (Then what
                was kept is of no use any more and is forgotten: load the backbone's weights again.)
        """
        model = _plain(model)
        record = self._record(model)
        targets = find_targets(self, model)
        for name in (*self.values, *self.whole):
            target, wrote = targets[name], record.written[name]
            if not torch.equal(read(target.tensor, target.index), wrote.to(target.tensor.device, target.tensor.dtype)):
                del _applied[model]
                raise DeltaError(
                    f"{name} was changed after the delta was applied, so that it cannot be reverted: "
                    "load the backbone's weights again"
                )
        _write_all(targets, record.kept, record.written)
        del _applied[model]

    def swap(self, model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
        """Replaces this delta, applied to the model, by another one of the same backbone.

        Raises:
            DeltaError: as `revert` and `apply`; where the new one cannot be applied, this one stays.
        """
        model = _plain(model)
        record = self._record(model)
        find_targets(new, model)
        self.revert(model)
        try:
            new.apply(model, verify)
        except BaseException:
            _write_all(find_targets(self, model), record.written, record.kept)
            _applied[model] = record
            raise

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
        del _applied[_plain(model)]

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

    def _new(self, name: str) -> Tensor:
        return next(group[name] for group in (self.values, self.whole, self.buffers) if name in group)

    def _record(self, model: nn.Module) -> Applied:
        record = _applied.get(model)
        if record is None:
            raise DeltaError("no delta is applied to this model, so there is nothing to revert")
        if record.delta is not self and record.delta != self:
            raise DeltaError("another delta is applied to this model: revert that one (fewtune.delta.applied(model))")
        return record

    def _verified(self, model: nn.Module, targets: Mapping[str, Target], verify: Verify) -> dict[str, Tensor]:
        """The original entries at the places of all targets, after a look at the fingerprint."""
        if verify not in ("fast", "full", "none"):
            raise DeltaError(f"verify={verify!r}; expected 'fast', 'full' or 'none'")
        kept = {name: read(target.tensor, target.index) for name, target in targets.items()}
        if verify != "none":
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            where = self._fast_positions if verify == "fast" else dict.fromkeys(self.fingerprint.tensors)
            parts = [
                read(tensors[name], index) if index is not None else tensors[name] for name, index in where.items()
            ]
            if (name := self.fingerprint.first_difference(parts, verify)) is not None:
                raise DeltaError(
                    f"the delta belongs to another backbone: {name} has other values in this model; load the "
                    "checkpoint that was tuned (if a task is already written into the model, load it anew)"
                )
        return kept

    @cached_property
    def _fast_positions(self) -> dict[str, Tensor | None]:
        return fast_positions(self.fingerprint.tensors, self.positions)


def applied(model: nn.Module) -> Delta | None:
    """The delta that is applied to a model in this process, or None."""
    record = _applied.get(_plain(model))
    return None if record is None else record.delta


def swap(model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
    """Replaces the delta that is applied to the model, or applies ``new`` where none is; see `Delta.swap`."""
    present = applied(model)
    if present is None:
        new.apply(model, verify)
    else:
        present.swap(model, new, verify)


def _plain(model: nn.Module) -> nn.Module:
    """The module itself, where it is wrapped by `torch.compile`."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def _write_all(targets: Mapping[str, Target], values: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Writes everything, or, should one write fail, nothing."""
    done: list[str] = []
    try:
        for name, target in targets.items():
            done.append(name)
            write(target.tensor, target.index, values[name])
    except BaseException:
        for name in done:
            write(targets[name].tensor, targets[name].index, before[name])
        raise
