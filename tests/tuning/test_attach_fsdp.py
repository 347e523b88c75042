"""Attached models under FSDP2: values shard beside the rows of their weight, and train as in one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import distributed
from attaching import CLASSES, batch, choose, same_bits, small_convnet, small_vit, state_of
from fewtune.errors import TuningError
from fewtune.tuning import Tuner, attach

STEPS = 3
TOLERANCE = 1e-10
"""Absolute, in float64."""


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def clip(parameters: list[nn.Parameter], most: float) -> None:
    """clip_grad_norm_ by the whole norm. torch 2.9 adds its 1e-6 to the norm of every process's part before it adds
    these up, so that two processes clip by another number than one, by some 1e-7."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
    for gradient in gradients:
        gradient.mul_(min(1.0, most / (norm + 1e-6)))


def train(run: nn.Module, tuner: Tuner, rank: int | None) -> None:
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01, weight_decay=0.1)
    dtype = next(run.parameters()).dtype
    for number in range(STEPS):
        optimizer.zero_grad()
        images, labels = batch(number, size=8, dtype=dtype)
        if rank is not None:
            images, labels = images.chunk(2)[rank], labels.chunk(2)[rank]
        output = run(images)
        F.cross_entropy(output if output.dtype is torch.float64 else output.float(), labels).backward()
        clip(tuner.parameters(), 1.0)
        optimizer.step()


def shard_all(model: nn.Module, **options: Any) -> nn.Module:
    for block in getattr(model, "blocks", ()):
        fully_shard(block, **options)
    return fully_shard(model, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "vit": (lambda: small_vit().double(), shard_all),
    "vit, one unit": (lambda: small_vit().double(), fully_shard),
    "vit, not resharded": (lambda: small_vit().double(), lambda m: shard_all(m, reshard_after_forward=False)),
    "vit, checkpointed": (lambda: checkpointed(small_vit().double()), shard_all),
    "convnet": (lambda: small_convnet().double(), shard_all),
}


def checkpointed(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model


class Trained:
    """A case trained alone (rank None) or as one of two processes."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self) -> dict[str, Any]:
        return self.trained(dist.get_rank())

    def trained(self, rank: int | None) -> dict[str, Any]:
        make, shard = CASES[self.kind]
        model = make()
        tuner = attach(model, choose(model))
        if rank is not None:
            shard(model)
        train(model, tuner, rank)
        got: dict[str, Any] = {"placed": {n: placed(model, n) for n in tuner.selection.places if rank is not None}}
        got["state"] = {name: whole(t) for name, t in model.state_dict().items()}
        got["plain"] = {name: whole(t) for name, t in tuner.plain_state_dict().items()}
        if rank is not None:
            options = StateDictOptions(full_state_dict=True)
            got["checkpoint"] = {n: t.clone() for n, t in get_model_state_dict(model, options=options).items()}
        got["values"] = {name: whole(t) for name, t in tuner.state_dict()["values"].items()}
        got["delta"] = tuner.delta()
        return got


def placed(model: nn.Module, name: str) -> dict[str, Any]:
    """Which rows of a weight and of its values this process holds."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight, values = module._parameters["weight"], module._parameters["weight_selected"]
    return {
        "sharded": isinstance(weight, DTensor) and weight.placements == values.placements == (Shard(0),),
        "rows": (weight.to_local().shape[0], values.to_local().shape[0]),
        "of": (weight.shape[0], values.shape[0]),
    }


def mixed_precision() -> dict[str, Any]:
    """Computed in bfloat16, reduced and kept in float32."""
    model = small_vit()
    tuner = attach(model, choose(model))
    before = {name: whole(p) for name, p in tuner.named_parameters().items()}
    shard_all(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train(model, tuner, dist.get_rank())
    images = batch(dtype=torch.float32)[0]
    with torch.no_grad():
        output = model.eval()(images)
    state = {name: whole(t) for name, t in tuner.plain_state_dict().items()}
    values = {name: whole(p) for name, p in tuner.named_parameters().items()}
    return {"before": before, "state": state, "values": values, "output": output}


def half_precision() -> dict[str, Any]:
    """A bfloat16 backbone, whose trained values have float32 masters."""
    model = small_vit().to(torch.bfloat16)
    tuner = attach(model, choose(model))
    shard_all(model)
    train(model, tuner, dist.get_rank())
    values = {name: whole(p) for name, p in tuner.named_parameters().items()}
    return {"plain": {n: whole(t) for n, t in tuner.plain_state_dict().items()}, "values": values}


def error_of(use: Callable[[], Any]) -> str:
    try:
        use()
    except TuningError as error:
        return str(error)
    return "no error"


def refused(model: nn.Module, **options: Any) -> str:
    tuner = attach(model, choose(model, **options))
    shard_all(model)
    return error_of(lambda: train(model, tuner, dist.get_rank()))


def ragged() -> str:
    return refused(small_vit(), granularity="layer")


def transposed() -> str:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(4 * 17 * 17, CLASSES))
    return refused(model, head="2")


def detached() -> str:
    model = small_vit()
    tuner = attach(model, choose(model))
    shard_all(model)
    train(model, tuner, dist.get_rank())
    message = error_of(tuner.detach)
    assert isinstance(model, FSDPModule)
    train(model, tuner, dist.get_rank())  # nothing was broken by the attempt
    return message


def attached_late() -> str:
    model = small_vit()
    selection = choose(model)
    shard_all(model)
    return error_of(lambda: attach(model, selection))


def attached_after_a_forward() -> str:
    """FSDP keeps what the outermost unit gathered for it, so that its parameters look whole."""
    model = small_vit()
    selection = choose(model)
    fully_shard(model)
    with torch.no_grad():
        model(batch(dtype=torch.float32)[0])
    return error_of(lambda: attach(model, selection))


def resumed() -> dict[str, Any]:
    """The compact state goes from one sharded model into another."""
    model, other = small_vit().double(), small_vit().double()
    tuner, others = attach(model, choose(model)), attach(other, choose(other))
    shard_all(model)
    shard_all(other)
    train(model, tuner, dist.get_rank())
    others.load_state_dict(tuner.state_dict())
    states = [{name: whole(t) for name, t in m.state_dict().items()} for m in (model, other)]
    images = batch()[0]
    with torch.no_grad():
        return {"same": same_bits(*states), "outputs": [m.eval()(images) for m in (model, other)]}


SCENARIOS = {kind: Trained(kind) for kind in CASES} | {
    "mixed precision": mixed_precision,
    "half precision": half_precision,
    "resumed": resumed,
    "ragged": ragged,
    "transposed": transposed,
    "detached": detached,
    "attached late": attached_late,
    "attached after a forward": attached_after_a_forward,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> distributed.Results:
    return distributed.run(SCENARIOS, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_train_as_one(results: distributed.Results, kind: str) -> None:
    one, (first, second) = Trained(kind).trained(None), results.of(kind)
    for part in ("state", "plain", "values"):
        assert same_bits(first[part], second[part])
        torch.testing.assert_close(first[part], one[part], rtol=0, atol=TOLERANCE)
    fresh = CASES[kind][0]()
    before = state_of(fresh)
    fresh.load_state_dict(first["plain"], strict=True)
    for name, places in first["delta"].selection().places.items():
        moved = (first["plain"][name] != before[name]).reshape(-1)
        assert moved[places.flat].any()
        moved[places.flat] = False
        assert not moved.any(), name


@pytest.mark.parametrize("kind", CASES)
def test_values_lie_beside_their_rows(results: distributed.Results, kind: str) -> None:
    first, second = (result["placed"] for result in results.of(kind))
    for name, mine in first.items():
        theirs = second[name]
        assert mine["sharded"]
        assert mine["rows"][0] == mine["rows"][1]
        assert mine["rows"][0] + theirs["rows"][0] == mine["of"][0] == mine["of"][1]


@pytest.mark.parametrize("kind", CASES)
def test_a_delta_and_a_full_checkpoint_can_be_taken(results: distributed.Results, kind: str) -> None:
    first, _ = results.of(kind)
    assert {n: t for n, t in first["checkpoint"].items() if n in first["plain"]}.keys() == first["plain"].keys()
    assert same_bits(first["checkpoint"], first["state"])
    plain = CASES[kind][0]()
    first["delta"].apply(plain)
    assert same_bits(state_of(plain), first["plain"])


def test_mixed_precision(results: distributed.Results) -> None:
    first, second = results.of("mixed precision")
    assert same_bits(first["state"], second["state"])
    torch.testing.assert_close(first["output"], second["output"])
    assert all(v.dtype is torch.float32 for v in first["values"].values())
    assert not any(torch.equal(v, first["before"][n]) for n, v in first["values"].items())
    plain = small_vit()
    plain.load_state_dict(first["state"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.eval()(batch(dtype=torch.float32)[0])
    torch.testing.assert_close(first["output"].float(), expected.float(), rtol=5e-2, atol=5e-2)


def test_half_precision_backbone(results: distributed.Results) -> None:
    first, second = results.of("half precision")
    assert same_bits(first["plain"], second["plain"])
    assert all(v.dtype is torch.float32 for v in first["values"].values())
    for name, value in first["values"].items():
        if value.shape == first["plain"][name].shape:
            assert torch.equal(first["plain"][name], value.bfloat16()), name


def test_resuming(results: distributed.Results) -> None:
    for result in results.of("resumed"):
        assert result["same"]
        assert torch.equal(*result["outputs"])


ERRORS = {
    "ragged": "the same number of connections in every neuron",
    "transposed": "the same number of connections in every neuron",
    "detached": r"cannot be detached: take tuner.plain_state_dict\(\)",
    "attached late": "attach first, then shard",
    "attached after a forward": "attach first, then shard",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_cannot_be_is_one_clear_error(results: distributed.Results, kind: str) -> None:
    for message in results.of(kind):
        assert re.search(ERRORS[kind], message)
