"""Weights that are shared out among processes: FSDP2 (`torch.distributed.fsdp.fully_shard`) gives each its rows.

Such a weight is told by what its tensor has, and torch.distributed is not imported where no processes are connected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the weights of this module when it is called, and lets them go again."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of weights that were gathered and are still whole, as FSDP keeps the outermost unit's after a forward."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is one process's part of a distributed tensor (a DTensor)."""
    return hasattr(tensor, "to_local")


def rows(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return held


def gathered(held: Tensor, like: Tensor) -> Tensor:
    """The whole of which each process holds rows, as it holds those of `like`, in every process and where `held` is.

    All processes must ask for it. Of a tensor that is not shared out it is the tensor itself.
    """
    if not is_sharded(like):
        return held
    from torch.distributed.tensor import DTensor

    mesh, placements, layout = like.device_mesh, like.placements, (like.size(), like.stride())  # type: ignore[attr-defined]
    on_device = held.to(like.device)  # where the processes can talk
    whole = DTensor.from_local(on_device, mesh, placements, run_check=False, shape=layout[0], stride=layout[1])
    return whole.full_tensor().to(held.device)


def processes(tensor: Tensor) -> int:
    """Among how many processes a tensor is shared out."""
    return int(tensor.device_mesh.size()) if is_sharded(tensor) else 1  # type: ignore[attr-defined]


def within_call(model: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(forward, *inputs)`` as if it were the model's own forward, with that one as its first argument.

    FSDP gathers the weights that lie in no block when the model is called, and once more for the backward pass of what
    the call returns: features must be what the call returns then.
    """
    own, before = model.forward, vars(model).get("forward")

    def forward(*given: Any) -> Any:
        features = function(own, *given)
        return features.clone() if isinstance(features, Tensor) else features  # the hooks of a view can be lost

    vars(model)["forward"] = forward
    try:
        return model(*inputs)
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before
