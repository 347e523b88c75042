"""Checkpoint files: their tensors, and a model that takes them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_safetensors
from torch import Tensor, nn

from fewtune.errors import ModelError, one_line
from fewtune.models.backbone import Backbone

State = dict[str, Tensor]


def load_checkpoint(path: str, build: Callable[[int | None], Backbone], num_classes: int | None) -> Backbone:
    """The architecture of `build(num_classes)` with the weights of the file at `path`.

    Everything but the head must fit by name and shape. A head for another number of classes is left fresh; with
    `num_classes` None the model gets as many classes as the file's head has.
    """
    state = read_state(Path(path))
    backbone = build(num_classes)
    if num_classes is None:
        classes = head_classes(backbone, state)
        backbone = build(classes) if classes != backbone.num_classes else backbone
    load_weights(backbone.model, state, backbone.head, f"file:{path}")
    return backbone


def read_state(path: Path) -> State:
    """The tensors of a safetensors file, or of a torch file, which is read with weights_only=True.

    Raises:
        ModelError: the file is missing or damaged, or holds other things than tensors.
    """
    if not path.is_file():
        raise ModelError(f"the checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(
            f"the checkpoint {path} cannot be read: {one_line(error, 100)}; "
            "expected .safetensors, or a torch file with nothing but tensors (it is read with weights_only=True)"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise ModelError(f"the checkpoint {path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"the checkpoint {path} holds no tensors; its keys are {', '.join(map(str, loaded))[:100]}")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def head_classes(backbone: Backbone, state: State) -> int:
    """How many classes the head in `state` has; 0 where it has none."""
    for name in backbone.head:
        weights = [k for k, _ in backbone.model.get_submodule(name).named_parameters(prefix=name)]
        tensors = [state[key] for key in weights if key in state]
        if tensors:
            return int(tensors[-1].shape[0])
    return 0


def load_weights(model: nn.Module, state: State, head: tuple[str, ...], what: str) -> None:
    """Copy `state` into the model, strictly but for a head of another shape or absent from `state`."""
    current = model.state_dict()
    in_head = {
        key for key in {*current, *state} if any(key.startswith(f"{name}.") for name in head or _absent_head(model))
    }
    state = {
        key: _resampled(model, value) if key == "pos_embed" and key in current else value
        for key, value in state.items()
        if not (key in in_head and (key not in current or current[key].shape != value.shape))
    }
    missing = [key for key in current if key not in state and key not in in_head]
    unexpected = [key for key in state if key not in current]
    reshaped = [key for key in state if key in current and state[key].shape != current[key].shape]
    if missing or unexpected or reshaped:
        parts = [
            f"{len(keys)} {word} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for word, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if keys
        ]
        raise ModelError(f"{what} does not fit {type(model).__name__}: {'; '.join(parts)}; is the architecture right?")
    model.load_state_dict({**current, **state})


def _absent_head(model: nn.Module) -> tuple[str, ...]:
    """What timm calls the head of a model that was made without one."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _resampled(model: nn.Module, positions: Tensor) -> Tensor:
    """timm's absolute position embeddings [1, prefix + grid, dim] for the model's own grid."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    wanted = getattr(model, "pos_embed", None)
    if grid is None or wanted is None or wanted.shape == positions.shape or positions.ndim != 3:
        return positions
    from timm.layers import resample_abs_pos_embed

    prefix = wanted.shape[1] - grid[0] * grid[1]
    return resample_abs_pos_embed(positions, new_size=list(grid), num_prefix_tokens=prefix)
