"""Half precision on CPUs: whether it is faster on this processor, and attention that gains by it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewtune.config import Recipe
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


@contextmanager
def attention_in_batches(recipe: Recipe) -> Iterator[None]:
    """Within, attention in bfloat16 on a CPU multiplies all heads of a batch at once.

    torch's fused kernel calls the library once a head of an image. In bfloat16 such a call costs more than the
    product: of a ViT-S at 70 px the backward pass of attention took a third of a step. Memory grows by one matrix of
    tokens x tokens a head, so other devices, and float32, where the fused kernel is as fast, keep it.
    """
    if recipe.precision != "bf16-mixed" or pick_device(recipe.accelerator).type != "cpu":
        yield
        return
    allowed = torch._C._get_math_sdp_allow_fp16_bf16_reduction()  # of CPUs too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def _attends(model: nn.Module) -> bool:
    """Whether the model has blocks of a transformer."""
    known = (BLOCKS.get(cls) for module in model.modules() for cls in lineage(module))
    return any(parts is not None and parts.attention is not None for parts in known)
