"""Whether half precision is faster on this processor, measured by a matrix product of the model's size."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import nn

from fewtune.methods.blocks import BLOCKS, lineage
from fewtune.training.loaders import pick_device
from fewtune.training.work import Work

ROWS, TRIES = 1024, 3
PAYS = 1.5
"""How many times as fast a product in bfloat16 must be: the rest of a step gains nothing."""


def offer(work: Work) -> str | None:
    """A line that offers bfloat16 where a transformer is trained in float32 on a CPU that multiplies it faster.

    Convolutional networks are left out: on processors with AVX512-BF16 they take longer under autocast.
    """
    recipe, model = work.recipe, work.backbone.model
    if recipe.precision != "32" or pick_device(recipe.accelerator).type != "cpu" or not _attends(model):
        return None
    faster = bfloat16_speed(model)
    if faster < PAYS:
        return None
    return (
        f"this processor multiplies bfloat16 {faster:.1f} times as fast as float32: precision=bf16-mixed shortens the "
        "steps of a transformer (here it stays off: results would differ a little)"
    )


def bfloat16_speed(model: nn.Module) -> float:
    """How many times as fast a product with the model's largest linear layer is in bfloat16; 0 where there is none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0.0
    largest = max(layers, key=lambda layer: layer.weight.numel())
    weight = torch.ones(largest.weight.shape)
    return _seconds(weight) / _seconds(weight.bfloat16())


@torch.no_grad()
def _seconds(weight: torch.Tensor) -> float:
    x = torch.ones(ROWS, weight.shape[1], dtype=weight.dtype)
    times = []
    for _ in range(TRIES + 1):  # the first sets the library up
        started = time.process_time()  # of this process: the clock would count what others take of the processor
        F.linear(x, weight)
        times.append(time.process_time() - started)
    return min(times[1:])


def _attends(model: nn.Module) -> bool:
    """Whether the model has blocks of a transformer."""
    known = (BLOCKS.get(cls) for module in model.modules() for cls in lineage(module))
    return any(parts is not None and parts.attention is not None for parts in known)
