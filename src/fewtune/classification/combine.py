"""Task files of one backbone made into one: the sum or the mean of tasks, or the two levels of a task in one file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewtune.delta import Delta, load_delta
from fewtune.delta.arithmetic import Combined
from fewtune.delta.levels import flatten, shared_of
from fewtune.errors import DeltaError, Progress
from fewtune.files import sha256
from fewtune.models import Backbone, backbone_from_description
from fewtune.training.seen import DIGEST

KEPT = ("task", "backbone", "class_names", "transform")
"""What a result takes over from the task whose head it has."""


def combine_files(
    how: Callable[..., Combined],
    files: Sequence[Path],
    out: Path,
    head: Path | None = None,
    progress: Progress | None = None,
) -> Combined:
    """Write the sum or the mean of some tasks as a new task file, which says what it was made of.

    Args:
        how: `fewtune.delta.arithmetic.add` or `average`.
        files: two or more; tasks of two levels are taken with their shared part.
        head: the file whose head and classes the result has; None where all have the same classes.

    Raises:
        DeltaError: a file is damaged, names no backbone or is of another one; heads of different classes.
    """
    named = load_delta(head or files[0])
    backbone = _backbone(named, head or files[0], progress)
    deltas = [_whole(backbone, file) for file in files]
    chosen = None if head is None else _whole(backbone, head)
    combined = how(backbone.model, deltas, chosen)
    metadata = {key: named.metadata[key] for key in KEPT if key in named.metadata} | {
        "method": how.__name__,
        "data": ", ".join(str(delta.metadata.get("data", "not named")) for delta in deltas),
        "made": {"by": how.__name__, "from": [{"file": f.name, "sha256": sha256(f)} for f in files]},
        **_seen(deltas),
    }
    result = replace(combined, delta=replace(combined.delta, metadata=metadata))
    result.delta.save(out)
    return result


def flatten_file(file: Path, out: Path, progress: Progress | None = None) -> Delta:
    """Write a task of two levels as one file, which stands on the plain backbone.

    Raises:
        DeltaError: the file stands on no shared part, or its shared file is not there.
    """
    task = load_delta(file)
    shared = shared_of(task.metadata, file)
    if shared is None:
        raise DeltaError(f"{file} stands on no shared part: it is one file already")
    flat = flatten(_backbone(task, file, progress).model, shared, task)
    flat.save(out)
    return flat


def _whole(backbone: Backbone, file: Path) -> Delta:
    task = load_delta(file)
    shared = shared_of(task.metadata, file)
    return task if shared is None else flatten(backbone.model, shared, task)


def _backbone(delta: Delta, file: Path, progress: Progress | None) -> Backbone:
    if "backbone" not in delta.metadata:
        raise DeltaError(f"{file} does not say its backbone; combine it in Python: fewtune.delta.arithmetic")
    classes = len(delta.metadata.get("class_names", ())) or 1
    return backbone_from_description(delta.metadata["backbone"], classes, progress)


def _seen(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The images from which any of the tasks was made; nothing where one of them does not say."""
    records = [delta.metadata.get("seen") for delta in deltas]
    if not all(isinstance(record, dict) and "sha256" in record for record in records):
        return {}
    contents = [base64.b64decode(record["sha256"]) for record in records if record is not None]
    digests = sorted({c[i : i + DIGEST] for c in contents for i in range(0, len(c), DIGEST)})
    return {"seen": {"images": len(digests), "sha256": base64.b64encode(b"".join(digests)).decode()}}
