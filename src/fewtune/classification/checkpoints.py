"""Whole checkpoints from task files, and back: what `fewtune delta apply | revert` do with files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewtune.delta import Delta, load_delta
from fewtune.errors import DeltaError, Progress
from fewtune.files import save_state
from fewtune.models import Backbone, backbone_from_description
from fewtune.models.checkpoint import load_weights, read_state


def apply_to_checkpoint(path: Path, checkpoint: Path, out: Path) -> None:
    """Apply a task file to a checkpoint file of its backbone and write the tuned checkpoint.

    Raises DeltaError where the checkpoint is not of the backbone that was tuned.
    """
    delta = load_delta(path)
    backbone = backbone_from_description(untrained(_description(delta, path)), len(delta.metadata["class_names"]))
    load_weights(backbone.model, read_state(checkpoint), backbone.head, str(checkpoint))
    delta.apply(backbone.model)
    save_state(backbone.model.state_dict(), out)


def revert_checkpoint(path: Path, tuned: Path, out: Path, original: Path | None, progress: Progress | None) -> None:
    """Take a task file's changes out of a tuned checkpoint and write the backbone, with the backbone's own head.

    Args:
        path: the task file.
        tuned: a checkpoint with the task in it.
        original: the backbone's checkpoint, which has the overwritten values; left out, the backbone that the task
            file names is loaded.

    Raises:
        DeltaError: the checkpoint does not hold the task's values.
    """
    delta, state = load_delta(path), read_state(tuned)
    description = _description(delta, path)
    if original is not None:
        before = read_state(original)
    else:
        task = backbone_from_description(description, len(delta.metadata["class_names"]), progress)
        original_backbone = backbone_from_description(description, None)
        before = {**original_backbone.model.state_dict(), **_outside_head(task)}
    head = set(delta.choice.head)
    for name, position in delta.positions.items():
        if name not in state or (name not in before and name not in head):
            raise DeltaError(
                f"{tuned if name not in state else original} has no tensor {name}; is it of this backbone?"
            )
        new = {**delta.values, **delta.whole, **delta.buffers}[name].reshape(-1)
        flat = state[name].reshape(-1)
        if name in head:
            continue
        held = flat if position is None else flat[position]
        if held.shape != new.shape or not torch.equal(held, new.to(held.dtype)):
            raise DeltaError(f"{tuned} does not hold this task: {name} has other values; nothing was written")
        old = before[name].reshape(-1).to(flat.dtype)
        flat = old.clone() if position is None else flat.scatter(0, position, old[position])
        state[name] = flat.reshape(state[name].shape)
    plain = {name: tensor for name, tensor in state.items() if name not in head}
    own_head = {name: tensor for name, tensor in before.items() if name not in plain}
    save_state({**plain, **own_head}, out)


def _outside_head(backbone: Backbone) -> dict[str, Tensor]:
    inside = tuple(f"{name}." for name in backbone.head)
    return {name: tensor for name, tensor in backbone.model.state_dict().items() if not name.startswith(inside)}


def _description(delta: Delta, path: Path) -> dict[str, Any]:
    if not {"backbone", "class_names"} <= set(delta.metadata):
        raise DeltaError(f"{path} does not name its backbone; apply it in Python to the model that it was made for")
    if (kind := delta.metadata.get("task", "classification")) != "classification":
        raise DeltaError(f"{path} is of a {kind} run; checkpoints are written and reverted for classification only")
    return unquantised(delta.metadata["backbone"])  # checkpoints hold float numbers


def unquantised(description: dict[str, Any]) -> dict[str, Any]:
    """The description of the same backbone in full precision."""
    arguments = {key: value for key, value in description["arguments"].items() if key != "quantise"}
    return {**description, "arguments": arguments}


def untrained(description: dict[str, Any]) -> dict[str, Any]:
    """The description of the same architecture without its weights."""
    arguments = {**unquantised(description)["arguments"], "pretrained": False}
    source = arguments.pop("architecture", description["source"])
    return {**description, "source": source, "arguments": arguments}
