"""Tasks in two files: a part that many tasks share, and each task's own part on top of it.

A task's metadata names its shared file by name and SHA-256. Applying is two exact writes, reverting them is exact too::

    shared = shared_of(task, "tasks/birds/delta.safetensors")
    shared.apply(model); task.apply(model, on=shared)
    task.revert(model); shared.revert(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewtune.delta.apply import SHARED, keep_but_head
from fewtune.delta.checks import inventory
from fewtune.delta.delta import Delta, load_delta
from fewtune.delta.entries import read
from fewtune.delta.take import frozen_buffers, take
from fewtune.errors import DeltaError
from fewtune.files import sha256
from fewtune.selection import Selection


def stands_on(shared: Path) -> dict[str, dict[str, str]]:
    """The metadata of a task that is made on the shared part in a file."""
    return {SHARED: {"file": shared.name, "sha256": sha256(shared)}}


def shared_of(metadata: Mapping[str, object], task: str | Path) -> Delta | None:
    """The shared part that a task's metadata names; None where the task stands on the backbone itself.

    It is looked for beside the task's file and one folder above.

    Args:
        metadata: the task's.
        task: the task's file.

    Raises:
        DeltaError: the shared file is not there, or is another one.
    """
    said = metadata.get(SHARED)
    if said is None:
        return None
    name, wanted = _said(said, task)
    folder = Path(task).resolve().parent
    candidates = [path for path in (folder / name, folder.parent / name) if path.is_file()]
    fitting = [path for path in candidates if sha256(path) == wanted]
    if fitting:
        return load_delta(fitting[0])
    what = f"another one lies at {candidates[0]}" if candidates else f"it is neither in {folder} nor one folder above"
    raise DeltaError(
        f"{task} stands on the shared part {name} (SHA-256 {wanted[:16]}…), and {what}: put the file there that was "
        "made with the task"
    )


def _said(said: Any, task: str | Path) -> tuple[str, str]:
    try:
        name, wanted = said["file"], said["sha256"]
    except (TypeError, LookupError):
        name = wanted = None
    if not isinstance(name, str) or not isinstance(wanted, str) or Path(name).name != name:
        raise DeltaError(f"{task} says that it stands on a shared part and not on which: it is damaged")
    return name, wanted


def merge_shared(model: nn.Module, shared: Delta) -> None:
    """Write a shared part into a model for good; the model keeps its own head.

    Raises:
        DeltaError: the model is another backbone; it is unchanged.
    """
    shared.apply(model)
    keep_but_head(model)


def flatten(model: nn.Module, shared: Delta, task: Delta) -> Delta:
    """One delta of the plain backbone with the effect of both levels, bit for bit.

    Args:
        model: the backbone; it is as before afterwards.

    Raises:
        DeltaError: the two do not fit, or belong to another backbone.
    """
    selection = task.selection() | shared.selection()
    with shared.applied_to(model):
        task.apply(model, on=shared)
        try:
            present = inventory(model)
            names = (*selection.places, *selection.whole, *selection.head)
            tuned = {name: present.parameters[name].detach().clone() for name in names}
            buffers = {name: present.tensors[name].detach().clone() for name in {**shared.buffers, **task.buffers}}
        finally:
            task.revert(model)
    metadata = {key: value for key, value in task.metadata.items() if key != SHARED}
    return made(model, selection, tuned, buffers, metadata)


def made(
    model: nn.Module,
    selection: Selection,
    tuned: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    metadata: Mapping[str, object],
) -> Delta:
    """The delta that leads from a plain model to these tensors, of which only those places change that are selected.

    Args:
        tuned: by name, the weights selected from, what is trained whole, and the head (of any number of classes).
        buffers: new running statistics.
    """
    present, views = inventory(model), selection.anatomy.views
    before = {
        name: read(present.parameters[name], views[name].stored_index(places.flat))
        for name, places in selection.places.items()
    }
    before |= {name: present.parameters[name].detach() for name in selection.whole}
    return take(
        selection,
        {**present.parameters, **tuned},
        before,
        buffers=buffers,
        buffers_before={name: present.tensors[name] for name in buffers},
        frozen={name: buffer for name, buffer in frozen_buffers(model).items() if name not in buffers},
        metadata=metadata,
    )
