"""Writing a delta into a model and taking it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock, RLock
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fewtune.delta.checks import Target, find_targets, inventory, require_finite
from fewtune.delta.contents import Contents
from fewtune.delta.entries import read, write
from fewtune.delta.full_precision import quantised_anew, tell_difference
from fewtune.delta.head import Resizing
from fewtune.errors import DeltaError
from fewtune.quantised import Overlaid

Verify = Literal["fast", "full", "none"]
SHARED = "shared"
"""Where a task's metadata says on which shared part it stands (`fewtune.delta.levels`)."""


@dataclass(frozen=True, eq=False)
class Applied:
    """What stands in a model: the delta, what it wrote, and what it overwrote, each by tensor name.

    ``head``: the parameters of the head that were replaced, since the task has another number of classes.
    ``overlaid``: what lies over the model's quantised weights in their place.
    """

    delta: Contents
    written: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    head: Resizing
    overlaid: Overlaid
    below: Applied | None = None
    """What was applied before, on which this one stands."""


# Kept beside the model, not on it: an attribute would be pickled and copied with the model. A copy of a model with a
# delta is a plain model with other weights, which every fingerprint refuses.
_applied: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_making_a_lock = Lock()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[nn.Module]:
    """The plain model, which no other thread applies to or reverts until the context ends."""
    model = _plain(model)
    with _making_a_lock:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield model


def applied_contents(model: nn.Module) -> Contents | None:
    """What is applied to a model in this process, or None."""
    record = _applied.get(_plain(model))
    return None if record is None else record.delta


def forget(model: nn.Module) -> None:
    """Drops what was kept of a model: what is applied stays for good."""
    _applied.pop(_plain(model), None)


def keep_but_head(model: nn.Module) -> None:
    """What is applied stays for good, but for its head: the model has its own again."""
    with alone_with(model) as model:
        record = _applied.pop(model)
        targets = _targets(model, record.delta)
        for name in record.delta.choice.head:
            if name in record.kept:
                write(targets[name].tensor, targets[name].index, record.kept[name])
        record.head.take_out()


def apply_delta(model: nn.Module, delta: Contents, verify: Verify, on: Contents | None = None) -> None:
    """See `Delta.apply`."""
    with alone_with(model) as model:
        below = _applied.get(model)
        if below is not None and on is None:
            raise DeltaError(
                "a delta is already applied to this model: revert it first, or replace it with delta.swap(model, new)"
            )
        if on is not None and (below is None or (below.delta is not on and below.delta != on)):
            raise DeltaError("the delta on which this one stands is not applied to the model: apply that one first")
        _applied[model] = replace(_put_in(model, delta, verify), below=below)


def revert_delta(model: nn.Module, delta: Contents) -> None:
    """See `Delta.revert`."""
    with alone_with(model) as model:
        record = _record(model, delta)
        _take_out(model, record)
        if record.below is None:
            del _applied[model]
        else:
            _applied[model] = record.below


def swap_delta(model: nn.Module, old: Contents, new: Contents, verify: Verify) -> None:
    """See `Delta.swap`."""
    with alone_with(model) as model:
        record = _record(model, old)
        _take_out(model, record)
        try:
            _applied[model] = replace(_put_in(model, new, verify), below=record.below)
        except BaseException:
            record.head.put_in()
            record.overlaid.put_in()
            _write_all(_targets(model, record.delta), record.written, record.kept)
            raise


def _plain(model: nn.Module) -> nn.Module:
    """The module itself, where it is wrapped by `torch.compile` or for data parallelism."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _plain(model.module)
    original = getattr(model, "_orig_mod", model)
    return _plain(original) if original is not model and isinstance(original, nn.Module) else model


def _record(model: nn.Module, delta: Contents) -> Applied:
    record = _applied.get(model)
    if record is None:
        raise DeltaError("no delta is applied to this model, so there is nothing to revert")
    if record.delta is not delta and record.delta != delta:
        raise DeltaError("another delta is applied to this model: revert that one (fewtune.delta.applied(model))")
    return record


def _put_in(model: nn.Module, delta: Contents, verify: Verify) -> Applied:
    """Checks everything, the backbone's fingerprint last, then writes."""
    if verify not in ("fast", "full", "none"):
        raise DeltaError(f"verify={verify!r}; expected 'fast', 'full' or 'none'")
    present = inventory(model)
    head = Resizing.of(model, present.parameters, delta.head_shapes)
    overlaid = Overlaid.of(model, delta.positions)
    present = present.replaced({**head.new, **overlaid.new})
    targets = find_targets(delta, present)
    seen = {} if verify == "none" else _verify(delta, present.tensors, verify)
    kept = {}
    for name, target in targets.items():
        if name in head.parameters:
            continue  # nothing is overwritten: the model's own parameter is put aside whole
        if target.index is not None and name in seen:
            # What the fingerprint has read of a weight begins with the entries to be overwritten.
            kept[name] = seen[name][: len(target.index)]
        else:
            kept[name] = read(target.tensor, target.index)
    written = {name: delta.new(name).reshape(-1).to(t.tensor.device, t.tensor.dtype) for name, t in targets.items()}
    require_finite(
        {name: values for name, values in written.items() if values.dtype != delta.new(name).dtype},
        "in the model's dtype",
    )
    _write_all(targets, written, kept)
    head.put_in()
    overlaid.put_in()
    return Applied(delta, written, kept, head, overlaid)


def _verify(delta: Contents, tensors: Mapping[str, Tensor], verify: Literal["fast", "full"]) -> dict[str, Tensor]:
    """Looks at the backbone's fingerprint; gives what it read of the tensors that it did not read whole."""
    positions = delta.fast_positions if verify == "fast" else dict.fromkeys(delta.fingerprint.tensors)
    anew = quantised_anew(delta, tensors)
    looked_at = {**tensors, **anew}
    parts = {n: looked_at[n] if index is None else read(looked_at[n], index) for n, index in positions.items()}
    if (name := delta.fingerprint.first_difference(parts.values(), verify)) is not None:
        shared = delta.metadata.get(SHARED)
        if isinstance(shared, dict):
            raise DeltaError(
                f"the task stands on the shared part {shared.get('file')} (SHA-256 {str(shared.get('sha256'))[:16]}…), "
                "which is not applied to this model, or the model is another backbone: apply that file first, then the "
                "task with on= it"
            )
        raise DeltaError(
            f"the delta belongs to another backbone: {name} has other values in this model; load the checkpoint that "
            "was tuned (if a task is already written into the model, load it anew)"
        )
    tell_difference(anew, tensors)
    return {name: part for name, part in parts.items() if positions[name] is not None and name not in anew}


def _take_out(model: nn.Module, record: Applied) -> None:
    """Writes back what was kept, if what was written is still there."""
    delta, targets = record.delta, _targets(model, record.delta)
    for name in delta.positions:
        # Of buffers only the shape is compared: running statistics may well have moved in the meantime.
        shape = delta.buffers[name].shape if name in delta.buffers else delta.choice.anatomy.shapes[name]
        same = name in targets and targets[name].tensor.shape == shape
        if not same or (name not in delta.buffers and not _holds(targets[name], record.written[name])):
            raise _changed(model, name)
    if not record.head.stands_in({name: target.tensor for name, target in targets.items()}):
        raise _changed(model, next(iter(record.head.parameters)))
    _write_all({name: targets[name] for name in record.kept}, record.kept, record.written)
    record.head.take_out()
    record.overlaid.take_out()


def _targets(model: nn.Module, delta: Contents) -> dict[str, Target]:
    """What a delta that was applied to a model wrote to, as far as it is there."""
    tensors = inventory(model).tensors
    return {name: Target(tensors[name], index) for name, index in delta.positions.items() if name in tensors}


def _changed(model: nn.Module, name: str) -> DeltaError:
    forget(model)
    return DeltaError(
        f"{name} was changed after the delta was applied, so that it cannot be reverted: "
        "load the backbone's weights again"
    )


def _holds(target: Target, values: Tensor) -> bool:
    tensor, index = target.tensor.detach(), target.index
    present = tensor.reshape(-1) if index is None else read(tensor, index)
    return torch.equal(present, values.to(present.device, present.dtype))


def _write_all(targets: Mapping[str, Target], values: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Writes everything, or, should one write fail, nothing."""

    def write_some(names: Iterable[str], source: Mapping[str, Tensor]) -> None:
        for name in names:
            begun.append(name)
            write(targets[name].tensor, targets[name].index, source[name])

    begun: list[str] = []
    with torch.inference_mode(any(target.tensor.is_inference() for target in targets.values())), torch.no_grad():
        try:
            write_some(targets, values)
        except BaseException:
            write_some([name for name in begun if name in before], before)
            raise
