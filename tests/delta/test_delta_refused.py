"""What a delta refuses, in one clear line and without a change to the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fewtune
from delta_cases import Small, Task, anatomy_of, choose, made_up, same_bits, state
from fewtune.delta import Delta, applied, load_delta, take
from fewtune.delta.format import to_bytes
from fewtune.errors import DeltaError
from fewtune.neurons import describe


@pytest.fixture
def model() -> Small:
    return Small()


@pytest.fixture
def task(model: Small) -> Task:
    return made_up(model, choose(anatomy_of(model), 1))


@pytest.fixture
def file(task: Task, tmp_path: Path) -> Path:
    task.delta.save(tmp_path / "task.safetensors")
    return tmp_path / "task.safetensors"


def refused(call: Callable[[], object], says: str, model: nn.Module | None = None) -> None:
    before = state(model) if model is not None else {}
    with pytest.raises(DeltaError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
    assert model is None or same_bits(state(model), before)


# ---- another backbone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("verify", ["fast", "full"])
def test_every_tensor_of_another_backbone_is_noticed_and_named(task: Task, dtype: torch.dtype, verify: str) -> None:
    """All tensors of this model are small or touched, so that the fast look reads nearly all of them."""
    names = [*task.delta.fingerprint.tensors]
    assert {"batch_norm.running_mean", "norm.weight", "wide.weight", "conv.bias"} <= set(names)
    assert not any("head" in name for name in names)
    for name in names:
        other = Small().to(dtype)
        tensor = other.get_buffer(name) if "running" in name else other.get_parameter(name)
        with torch.no_grad():
            # The first place that the delta overwrites, or simply the first entry.
            index = task.delta.positions.get(name)
            where = torch.tensor(0) if index is None else index[0]
            tensor[torch.unravel_index(where, tensor.shape)] += 0.25
        refused(lambda other=other: task.delta.apply(other, verify=verify), f"another backbone: {name} has", other)


def test_full_sees_what_fast_may_miss(model: Small) -> None:
    large = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    anatomy = describe(large, head="1")
    task = made_up(large, choose(anatomy, 1))
    index = task.delta.fast_positions["0.weight"]
    assert index is not None
    unseen = next(i for i in range(90_000) if i not in set(index.tolist()))
    with torch.no_grad():
        large[0].weight.view(-1)[unseen] += 1
    refused(lambda: task.delta.apply(large, verify="full"), r"0\.weight has other values", large)
    with task.delta.applied_to(large):
        assert applied(large) is task.delta


def test_the_first_tensor_that_differs_is_named(task: Task) -> None:
    other = Small(seed=1)
    refused(lambda: task.delta.apply(other), r"another backbone: conv\.weight has other values", other)


def test_a_copy_with_the_task_in_it_is_no_backbone(model: Small, task: Task) -> None:
    task.delta.apply(model)
    twin = copy.deepcopy(model)
    refused(lambda: task.delta.apply(twin), "if a task is already written into the model, load it anew", twin)


def test_two_roundings_are_another_backbone(model: Small) -> None:
    """A delta taken in one half precision does not know the other: documented in `fingerprint`."""
    for taken, used in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        cast, other = copy.deepcopy(model).to(taken), copy.deepcopy(model).to(used)
        delta = made_up(cast, choose(anatomy_of(cast), 1)).delta
        refused(lambda delta=delta, other=other: delta.apply(other), "another backbone", other)


def test_a_delta_of_a_cast_fits_the_original(model: Small) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        delta = made_up(cast, choose(anatomy_of(cast), 1)).delta
        delta.apply(model, verify="full")
        delta.revert(model)


def test_verify_none_looks_at_names_and_shapes_only(model: Small, task: Task) -> None:
    other = Small(seed=1)
    before = state(other)
    with task.delta.applied_to(other, verify="none"):
        assert not same_bits(state(other), before)
    assert same_bits(state(other), before)
    refused(lambda: task.delta.apply(other, verify="quick"), "expected 'fast', 'full' or 'none'", other)  # type: ignore[arg-type]


# ---- another shape of model ---------------------------------------------------------------------------------------


def without(name: str) -> nn.Module:
    model = Small()
    setattr(model, name, nn.Identity())
    return model


def changed(name: str, module: nn.Module) -> nn.Module:
    model = Small()
    setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: changed("head", nn.Linear(65, 7)),
            r"head head\.weight is \[3, 64\] and the model's is \[7, 65\]: create .* 3 classes",
        ),
        (lambda: without("head"), r"head has head\.weight \[3, 64\] and the model has none: create .* 3 classes"),
        (lambda: without("norm"), r"the model has no parameter norm\.weight"),
        (lambda: without("batch_norm"), r"the model has no parameter batch_norm\.weight"),
        (lambda: changed("more", nn.Linear(2, 2)), r"it has no parameter more\.weight, the model has one"),
        (lambda: changed("linear", nn.Linear(9, 8)), r"linear\.weight is \[7, 9\] in the delta and \[8, 9\] in"),
        (
            lambda: changed("batch_norm", nn.BatchNorm2d(6, track_running_stats=False)),
            r"no batch_norm\.running_mean of",
        ),
        (lambda: nn.Linear(2, 2), r"the model has none: create"),
    ],
)
def test_another_model(task: Task, other: Callable[[], nn.Module], says: str) -> None:
    refused(lambda: task.delta.apply(present), says, present := other())


def test_unfit_tensors(task: Task) -> None:
    refused(lambda: task.delta.apply(Small().to("meta")), "is on the meta device: load the backbone's weights first")
    expanded = Small()
    expanded.linear.bias.data = torch.zeros(1).expand(7)
    refused(lambda: task.delta.apply(expanded, verify="none"), r"linear\.bias is an expanded tensor", expanded)
    integers = Small()
    integers.linear.weight = nn.Parameter(torch.zeros(7, 9, dtype=torch.int8), requires_grad=False)
    refused(lambda: task.delta.apply(integers), r"linear\.weight is of torch\.int8", integers)


def test_values_beyond_the_models_dtype(model: Small) -> None:
    selection = choose(anatomy_of(model), 1)
    task = made_up(model, selection)
    big = replace(task.delta, whole={**task.delta.whole, "linear.bias": torch.full((7,), 1e6)})
    half = copy.deepcopy(model).half()
    refused(lambda: big.apply(half), r"linear\.bias holds NaN or infinite values in the model's dtype", half)
    big.apply(model)


def test_attached_model() -> None:
    model = Small()
    task = made_up(model, choose(describe(model, head="head"), 1))
    tuner = fewtune.attach(model, task.delta.selection())
    refused(lambda: task.delta.apply(model), r"attached to this model \(at .*\): detach its tuner first", model)
    tuner.detach(keep=False)
    task.delta.apply(model)
    tuner = fewtune.attach(model, task.delta.selection())
    refused(lambda: task.delta.revert(model), "detach its tuner first", model)
    tuner.detach(keep=False)
    task.delta.revert(model)
    assert same_bits(state(model), task.original)


# ---- order --------------------------------------------------------------------------------------------------------


def test_order_of_apply_revert_and_swap(model: Small, task: Task) -> None:
    other = made_up(model, task.delta.selection(), seed=9).delta
    foreign = made_up(Small(seed=1), task.delta.selection()).delta
    wide = changed("head", nn.Linear(65, 5))
    wider = made_up(wide, choose(anatomy_of(wide), 1)).delta
    refused(lambda: task.delta.revert(model), "no delta is applied to this model", model)
    refused(lambda: task.delta.swap(model, other), "no delta is applied to this model", model)
    task.delta.apply(model)
    refused(lambda: other.apply(model), r"already applied .* delta\.swap\(model, new\)", model)
    refused(lambda: task.delta.apply(model), r"already applied", model)
    refused(lambda: other.revert(model), "another delta is applied to this model", model)
    refused(lambda: task.delta.swap(model, foreign), "another backbone", model)
    refused(lambda: task.delta.swap(model, wider), "head", model)
    assert applied(model) is task.delta
    task.delta.revert(model)
    assert same_bits(state(model), task.original)


# ---- files --------------------------------------------------------------------------------------------------------


def test_missing_file_and_folder(task: Task, tmp_path: Path) -> None:
    refused(lambda: load_delta(tmp_path / "none.safetensors"), r"none\.safetensors does not exist")
    refused(lambda: load_delta(tmp_path), "cannot be read: Is a directory")
    refused(lambda: task.delta.save(tmp_path / "no" / "task.safetensors"), "cannot be written: No such file")


def test_wrong_kind_of_file(file: Path, task: Task, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    refused(lambda: load_delta(other), "not a delta file")
    other.write_bytes(pickle.dumps({"weight": 1}))
    refused(lambda: load_delta(other), "not a delta file")
    other.write_text("hello, I am no delta")
    refused(lambda: load_delta(other), "not a delta file")
    safetensors.torch.save_file({"weight": torch.ones(2)}, other)
    refused(lambda: load_delta(other), "a safetensors file of another program")
    task.delta.selection().save(other)
    refused(lambda: load_delta(other), r"is a 'fewtune-selection' file; expected a fewtune-delta")


def test_newer_version(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(rb"\"version\": 1", rb"\"version\": 2"))
    refused(lambda: load_delta(file), r"has version 2; this fewtune reads up to 1: update fewtune")


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 1.0])
def test_truncated_or_altered(file: Path, at: float) -> None:
    content = file.read_bytes()
    place = min(int(at * len(content)), len(content) - 1)
    file.write_bytes(content[:place])
    refused(lambda: load_delta(file), "truncated or altered|damaged")
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    refused(lambda: load_delta(file), "truncated or altered|damaged")
    file.write_bytes(content)
    load_delta(file)


def test_altered_metadata_is_noticed(model: Small, tmp_path: Path) -> None:
    content = to_bytes(made_up(model, choose(anatomy_of(model), 1), metadata={"accuracy": 0.71}).delta)
    (tmp_path / "forged").write_bytes(content.replace(b"0.71", b"0.99"))
    refused(lambda: load_delta(tmp_path / "forged"), "truncated or altered: its checksum does not agree")


# ---- take ---------------------------------------------------------------------------------------------------------


def parts(model: Small) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    selection = choose(anatomy_of(model), 1)
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = {n: tuned[n].reshape(-1)[: len(p)] for n, p in selection.places.items()}
    return tuned, before | {n: tuned[n].clone() for n in selection.whole}


def test_take_refuses_what_is_not_whole(model: Small) -> None:
    selection = choose(anatomy_of(model), 1)
    tuned, before = parts(model)
    take(selection, {**tuned, "linear.weight_selected": torch.ones(3)}, before)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            forged = {**tuned, "head.bias": torch.tensor([0.0, bad, 0.0])}
        refused(lambda forged=forged: take(selection, forged, before), "head.bias holds NaN or infinite values")
    refused(
        lambda: take(selection, {n: t for n, t in tuned.items() if n != "norm.bias"}, before), "no parameter norm.bias"
    )
    refused(lambda: take(selection, tuned, {"conv.weight": before["conv.weight"]}), "no original values of columns")
    refused(lambda: take(selection, tuned, before, buffers={"a": torch.ones(1)}), "buffers without their old values: a")
    refused(lambda: take(selection, {**tuned, "head.bias": torch.ones(4)}, before), r"head.bias has the shape \[4\]")


def test_public_names() -> None:
    assert fewtune.load_delta is load_delta
    assert fewtune.Delta is Delta
