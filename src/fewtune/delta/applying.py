"""Writing a delta into a model and taking it out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fewtune.delta.checks import Inventory, Target, find_targets, inventory, require_finite
from fewtune.delta.entries import read, write
from fewtune.errors import DeltaError

if TYPE_CHECKING:
    from fewtune.delta.task import Delta

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


def applied(model: nn.Module) -> Delta | None:
    """The delta that is applied to a model in this process, or None."""
    record = _applied.get(_plain(model))
    return None if record is None else record.delta


def forget(model: nn.Module) -> None:
    """Drops what was kept of a model: what is applied stays for good."""
    _applied.pop(_plain(model), None)


def apply_delta(model: nn.Module, delta: Delta, verify: Verify) -> None:
    """See `Delta.apply`."""
    model = _plain(model)
    if model in _applied:
        raise DeltaError(
            "a delta is already applied to this model: revert it first, or replace it with delta.swap(model, new)"
        )
    found = inventory(model)
    _applied[model] = _put(delta, found, find_targets(delta, found), verify)


def revert_delta(model: nn.Module, delta: Delta) -> None:
    """See `Delta.revert`."""
    model = _plain(model)
    record = _record(model, delta)
    _take_out(model, record, inventory(model))
    del _applied[model]


def swap_delta(model: nn.Module, old: Delta, new: Delta, verify: Verify) -> None:
    """See `Delta.swap`."""
    model = _plain(model)
    record, found = _record(model, old), inventory(model)
    targets = find_targets(new, found)
    before = _take_out(model, record, found)
    try:
        _applied[model] = _put(new, found, targets, verify)
    except BaseException:
        _write_all(before, record.written, record.kept)
        raise


def _plain(model: nn.Module) -> nn.Module:
    """The module itself, where it is wrapped by `torch.compile` or for data parallelism."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _plain(model.module)
    original = getattr(model, "_orig_mod", model)
    return _plain(original) if original is not model and isinstance(original, nn.Module) else model


def _record(model: nn.Module, delta: Delta) -> Applied:
    record = _applied.get(model)
    if record is None:
        raise DeltaError("no delta is applied to this model, so there is nothing to revert")
    if record.delta is not delta and record.delta != delta:
        raise DeltaError("another delta is applied to this model: revert that one (fewtune.delta.applied(model))")
    return record


def _put(delta: Delta, found: Inventory, targets: Mapping[str, Target], verify: Verify) -> Applied:
    """Looks at the backbone's fingerprint, then writes."""
    if verify not in ("fast", "full", "none"):
        raise DeltaError(f"verify={verify!r}; expected 'fast', 'full' or 'none'")
    seen = {} if verify == "none" else _verify(delta, found.tensors, verify)
    kept = {}
    for name, target in targets.items():
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
    return Applied(delta, written, kept)


def _verify(delta: Delta, found: Mapping[str, Tensor], verify: Literal["fast", "full"]) -> dict[str, Tensor]:
    """Looks at the backbone's fingerprint; gives what it read of the tensors that it did not read whole."""
    positions = delta.fast_positions if verify == "fast" else dict.fromkeys(delta.fingerprint.tensors)
    parts = {n: found[n] if index is None else read(found[n], index) for n, index in positions.items()}
    if (name := delta.fingerprint.first_difference(parts.values(), verify)) is not None:
        raise DeltaError(
            f"the delta belongs to another backbone: {name} has other values in this model; load the checkpoint that "
            "was tuned (if a task is already written into the model, load it anew)"
        )
    return {name: part for name, part in parts.items() if positions[name] is not None}


def _take_out(model: nn.Module, record: Applied, found: Inventory) -> dict[str, Target]:
    """Writes back what was kept, if what was written is still there; gives the tensors that it wrote to."""
    delta = record.delta
    tensors = found.tensors
    targets = {n: Target(tensors[n], index) for n, index in delta.positions.items() if n in tensors}
    for name in delta.positions:
        # Of buffers only the shape is compared: running statistics may well have moved in the meantime.
        shape = delta.buffers[name].shape if name in delta.buffers else delta.choice.anatomy.shapes[name]
        same = name in targets and targets[name].tensor.shape == shape
        if not same or (name not in delta.buffers and not _holds(targets[name], record.written[name])):
            forget(model)
            raise DeltaError(
                f"{name} was changed after the delta was applied, so that it cannot be reverted: "
                "load the backbone's weights again"
            )
    _write_all(targets, record.kept, record.written)
    return targets


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
            write_some(tuple(begun), before)
            raise
