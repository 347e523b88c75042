"""Attached models under DistributedDataParallel: two processes train as one does, and send compact values only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import distributed
from attaching import batch, choose, same_bits, small_convnet, small_vit, state_of
from fewtune.tuning import attach, column_rms

STEPS = 3
TOLERANCE = 1e-10
"""Absolute, in float64: the two processes add in another order than one."""

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "vit": (small_vit, {}),
    "vit, as views of buckets": (small_vit, {"gradient_as_bucket_view": True}),
    "vit, accumulated": (small_vit, {"accumulate": 2}),
    "vit, checkpointed": (small_vit, {"static_graph": True, "checkpointing": True}),
    "convnet": (small_convnet, {}),
    "convnet, layer": (small_convnet, {"granularity": "layer"}),
    "vit, optimizer sharded": (small_vit, {"zero": True}),
    "vit, bfloat16": (small_vit, {"dtype": torch.bfloat16}),
    "vit, in units of its input": (small_vit, {"units": True}),
}


@contextmanager
def broadcast_tensors() -> Iterator[list[Tensor]]:
    """Every tensor that is broadcast within."""
    seen: list[Tensor] = []
    coalesced = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        seen.extend(tensors)
        coalesced(group, tensors, *rest)

    dist._broadcast_coalesced = counted
    try:
        yield seen
    finally:
        dist._broadcast_coalesced = coalesced


def train(kind: str, rank: int | None) -> dict[str, Any]:
    """Some steps of a case: alone (rank None, the whole batch) or as one of two processes (half of it)."""
    make, options = CASES[kind]
    options = dict(options)
    dtype, accumulate = options.pop("dtype", torch.float64), options.pop("accumulate", 1)
    model = make().to(dtype)
    if options.pop("checkpointing", False):
        model.set_grad_checkpointing()
    selection = choose(model, granularity=options.pop("granularity", "neuron"))
    seen = None
    if options.pop("units", False):
        images, labels = batch(size=8)
        share = images if rank is None else images.chunk(2)[rank]
        seen = column_rms(model, [(share, labels)], {name: selection.anatomy.views[name] for name in selection.places})
    tuner = attach(model, selection, column_rms=seen)
    zero = options.pop("zero", False) and rank is not None
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    reduced: list[int] = []
    run: Any = model
    with broadcast_tensors() as broadcast:
        if rank is not None:
            run = DistributedDataParallel(model, **options)
            run.register_comm_hook(reduced, counting)
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = (
            ZeroRedundancyOptimizer(tuner.parameters(), torch.optim.SGD, **settings)
            if zero
            else torch.optim.SGD(tuner.parameters(), **settings)
        )
        for number in range(STEPS):
            optimizer.zero_grad()
            for part in range(accumulate):
                images, labels = batch(10 * number + part, size=8, dtype=dtype)
                if rank is not None:
                    images, labels = images.chunk(2)[rank], labels.chunk(2)[rank]
                last = part == accumulate - 1
                with nullcontext() if rank is None or last else run.no_sync():
                    F.cross_entropy(run(images).float() if dtype is torch.bfloat16 else run(images), labels).backward()
            optimizer.step()
    return {
        "state": state_of(model),
        "names": list(tuner.named_parameters()),
        "trained": tuner.trained,
        "bytes": reduced,
        "foreign": [tuple(t.shape) for t in broadcast if t.data_ptr() not in own],
        "broadcast": len(broadcast),
    }


def counting(reduced, bucket):  # DDP refuses annotations that are strings
    buffer = bucket.buffer()
    reduced.append(buffer.numel() * buffer.element_size())
    return allreduce_hook(None, bucket)


class InTwo:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self) -> dict[str, Any]:
        return train(self.kind, dist.get_rank())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> distributed.Results:
    return distributed.run({kind: InTwo(kind) for kind in CASES}, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_train_as_one(results: distributed.Results, kind: str) -> None:
    one, (first, second) = train(kind, None), results.of(kind)
    assert same_bits(first["state"], second["state"])
    half = one["state"]["head.weight"].dtype is torch.bfloat16
    for name, tensor in one["state"].items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=0, atol=2e-2 if half else TOLERANCE)
    make, options = CASES[kind]
    before = state_of(make().to(options.get("dtype", torch.float64)))
    assert not any(torch.equal(first["state"][name], before[name]) for name in one["names"])


@pytest.mark.parametrize("kind", CASES)
def test_only_compact_values_are_reduced(results: distributed.Results, kind: str) -> None:
    """A step sends one number for each trained parameter, and no index is ever sent."""
    width = 4 if "bfloat16" in kind else 8
    for result in results.of(kind):
        assert sum(result["bytes"]) == STEPS * result["trained"] * width
        assert result["broadcast"] > 0
        assert result["foreign"] == []
