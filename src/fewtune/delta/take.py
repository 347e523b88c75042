"""`take`: from a tuned model to a delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fewtune.delta.checks import as_json, check_contents
from fewtune.delta.delta import Delta
from fewtune.delta.entries import read, writable, write
from fewtune.delta.fingerprint import Covered, Fingerprint
from fewtune.errors import DeltaError
from fewtune.neurons import Role
from fewtune.quantised import scheme
from fewtune.selection import Selection


def frozen_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a backbone, such as running statistics: those with numbers that are saved with it."""
    saved = model.state_dict(keep_vars=True)
    return {n: b for n, b in model.named_buffers() if n in saved and b.is_floating_point()}


def take(
    selection: Selection,
    tuned: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    *,
    buffers: Mapping[str, Tensor] | None = None,
    buffers_before: Mapping[str, Tensor] | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Delta:
    """What a task changed.

    Args:
        selection: what was tuned.
        tuned: all parameters of the tuned model by their first names (others are ignored).
        before: the original numbers: of a selected weight those at its places, 1-D in the order of ``places.flat``;
            of a parameter trained whole (outside the head) all of it.
        buffers, buffers_before: the buffers that changed, new and old.
        frozen: buffers that stay as they are and by which the backbone is known too (`frozen_buffers`).
        metadata: JSON values by name, to keep with the delta.

    Raises:
        DeltaError: values that are NaN or infinite, shapes that do not fit, or metadata that is no JSON.
    """
    anatomy, buffers, old_buffers = selection.anatomy, buffers or {}, buffers_before or {}
    if absent := anatomy.shapes.keys() - tuned.keys():
        raise DeltaError(f"take got no parameter {_first(absent)}")
    if buffers.keys() != old_buffers.keys():
        raise DeltaError(f"take got buffers without their old values: {_first(buffers.keys() ^ old_buffers.keys())}")
    needed = {*selection.places, *selection.whole} - set(selection.head)
    if missing := needed - before.keys():
        raise DeltaError(f"take got no original values of {_first(missing)}")
    if not all(len(places) for places in selection.places.values()):
        selection = replace(selection, places={n: p for n, p in selection.places.items() if len(p)})
    places = {n: anatomy.views[n].stored_index(p.flat) for n, p in selection.places.items()}
    whole = [*selection.whole, *selection.head]

    backbone = {n: tuned[n] for n in anatomy.shapes if anatomy.roles.get(n) is not Role.HEAD}
    unchanged = {**(frozen or {}), **old_buffers}
    covered = {n: Covered.of(t) for n, t in {**backbone, **unchanged}.items()}

    def originals() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in backbone.items():
            yield name, _original(tensor, places.get(name), before[name] if name in needed else None)
        yield from unchanged.items()

    delta = Delta(
        selection,
        values={name: _own(read(tuned[name], index)) for name, index in places.items()},
        whole={name: _own(tuned[name]) for name in whole},
        buffers={name: _own(buffer) for name, buffer in buffers.items()},
        fingerprint=Fingerprint.of(originals(), covered, {**places, **dict.fromkeys((*whole, *buffers))}),
        metadata=as_json(metadata or {}),
        quantised={n: words for n, t in backbone.items() if (words := scheme(t)) is not None},
    )
    check_contents(delta)
    return delta


def _original(tensor: Tensor, index: Tensor | None, before: Tensor | None) -> Tensor:
    """The tensor as it was before tuning."""
    if before is None:
        return tensor
    if index is None:
        return before.detach()
    copy = writable(tensor, index)
    write(copy, index, before)
    return copy


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _first(names: set[str]) -> str:
    return min(names)
