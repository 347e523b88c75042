"""A delta: taken, applied, reverted, swapped, saved and loaded without the loss of a bit."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from delta_cases import Small, Task, anatomy_of, bits, choose, made_up, same_bits, state
from fewtune.delta import applied, load_delta, swap, take
from fewtune.delta.delta import from_bytes
from fewtune.delta.format import to_bytes
from fewtune.errors import DeltaError
from fewtune.neurons import Places, describe

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HOW = [1, 2, 5, "ragged", "all", "one"]


@pytest.fixture
def model() -> Small:
    return Small()


@pytest.fixture
def task(model: Small) -> Task:
    return made_up(model, choose(anatomy_of(model), 2), metadata={"name": "birds", "nested": {"a": [1, None, 0.5]}})


# ---- laws ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(HOW),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed in memory"]),
    buffers=st.booleans(),
    seed=st.integers(0, 99),
)
def test_laws(dtype: torch.dtype, how: str | int, layout: str, buffers: bool, seed: int) -> None:
    """apply gives the tuned model; revert(apply) and load(save) are identities; any dtype, selection and strides."""
    model = Small(seed=seed).to(dtype)
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif layout == "transposed in memory":
        for module in (model.linear, model.columns, model.wide, model.head):
            module.weight.data = module.weight.data.T.contiguous().T
    task = made_up(model, choose(anatomy_of(model), how, seed), seed, buffers)
    assert same_bits(state(model), task.original)
    content = to_bytes(task.delta)
    loaded = from_bytes(content)
    assert loaded == task.delta
    assert loaded.selection() == task.delta.selection()
    assert to_bytes(loaded) == content
    strides = {name: p.stride() for name, p in model.named_parameters()}
    for verify in ("fast", "full", "none"):
        for delta in (task.delta, loaded):
            delta.apply(model, verify=verify)
            assert same_bits(state(model), task.tuned)
            delta.revert(model)
            assert same_bits(state(model), task.original)
    assert strides == {name: p.stride() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_is_revert_and_apply(dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    anatomy = anatomy_of(model)
    one, two = made_up(model, choose(anatomy, 1, 5), 1, buffers=True), made_up(model, choose(anatomy, "ragged", 6), 2)
    one.delta.apply(model)
    one.delta.swap(model, two.delta)
    assert same_bits(state(model), two.tuned)
    assert applied(model) is two.delta
    swap(model, one.delta)
    assert same_bits(state(model), one.tuned)
    one.delta.revert(model)
    assert same_bits(state(model), one.original)
    swap(model, two.delta)
    assert same_bits(state(model), two.tuned)
    two.delta.revert(model)


def test_context_reverts_after_an_exception(model: Small, task: Task) -> None:
    with task.delta.applied_to(model) as inside:
        assert inside is model
        assert same_bits(state(model), task.tuned)
    assert same_bits(state(model), task.original)
    with pytest.raises(KeyError, match="mine"), task.delta.applied_to(model):
        raise KeyError("mine")
    assert same_bits(state(model), task.original)
    assert applied(model) is None


def test_merge_is_for_good(model: Small, task: Task) -> None:
    task.delta.merge(model)
    assert same_bits(state(model), task.tuned)
    with pytest.raises(DeltaError, match="no delta is applied"):
        task.delta.revert(model)


# ---- the same backbone in other forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_of_the_backbone(model: Small, task: Task, dtype: torch.dtype) -> None:
    cast = copy.deepcopy(model).to(dtype)
    before = state(cast)
    for verify in ("fast", "full"):
        task.delta.apply(cast, verify=verify)
        assert same_bits(state(cast), {n: t.to(before[n].dtype) for n, t in task.tuned.items()})
        task.delta.revert(cast)
        assert same_bits(state(cast), before)


def test_cast_while_applied(model: Small, task: Task) -> None:
    expected = state(copy.deepcopy(model).half())
    task.delta.apply(model)
    model.half()
    task.delta.revert(model)
    assert same_bits(state(model), expected)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.two.weight = self.one.weight

    model = Tied()
    task = made_up(model, choose(describe(model, head="head"), 2))
    task.delta.apply(model)
    assert model.two.weight is model.one.weight
    assert same_bits(state(model), task.tuned)
    task.delta.revert(model)
    assert same_bits(state(model), task.original)


def test_wrappers_are_their_model(model: Small, task: Task) -> None:
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        task.delta.apply(wrapped)
        assert applied(model) is task.delta
        task.delta.revert(model)
        assert same_bits(state(model), task.original)


def test_swapping_does_not_compile_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    anatomy = describe(model, head="2")
    tasks = [made_up(model, choose(anatomy, k), seed=k) for k in (1, 2)]
    counter, images = CompileCounter(), torch.randn(3, 6)
    compiled = torch.compile(model, backend=counter)
    with torch.inference_mode():
        outputs = [compiled(images)]
        for task in tasks:
            swap(compiled, task.delta)
            outputs.append(compiled(images))
        tasks[1].delta.revert(compiled)
        assert bits(compiled(images)) == bits(outputs[0])
    assert counter.frame_count == 1
    assert len({bits(output) for output in outputs}) == 3


def test_applied_in_inference_mode_and_reverted_outside(model: Small, task: Task) -> None:
    with torch.inference_mode():
        task.delta.apply(model)
    task.delta.revert(model)
    assert same_bits(state(model), task.original)
    assert not any(t.is_inference() for t in model.state_dict().values())
    model.linear(torch.randn(2, 9)).sum().backward()


def test_model_made_in_inference_mode(task: Task) -> None:
    with torch.inference_mode():
        model = Small()
    task.delta.apply(model)
    assert same_bits(state(model), task.tuned)
    task.delta.revert(model)
    assert same_bits(state(model), task.original)


def test_gradients_do_not_see_the_writing(model: Small, task: Task) -> None:
    model.requires_grad_(True)
    task.delta.apply(model)
    assert all(p.is_leaf and p.grad_fn is None and p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(task: Task) -> None:
    model = Small().cuda()
    task.delta.apply(model, verify="full")
    assert same_bits(state(model), task.tuned)
    task.delta.revert(model)
    assert same_bits(state(model), task.original)
    task.delta.apply(model)
    model.cpu()
    task.delta.revert(model)
    assert same_bits(state(model), task.original)
    assert made_up(Small().cuda(), task.delta.selection()).delta == made_up(Small(), task.delta.selection()).delta


# ---- what is kept with the model ----------------------------------------------------------------------------------


def test_nothing_is_left_on_the_model(task: Task, tmp_path: Path) -> None:
    model = Small()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    task.delta.apply(model)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert applied(twin) is None
    torch.save(model, tmp_path / "model.pt")
    assert applied(torch.load(tmp_path / "model.pt", weights_only=False)) is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_another_load_of_the_same_file_may_revert(model: Small, task: Task) -> None:
    content = to_bytes(task.delta)
    from_bytes(content).apply(model)
    from_bytes(content).revert(model)
    assert same_bits(state(model), task.original)


def test_revert_of_a_changed_model_is_refused_and_forgotten(model: Small, task: Task) -> None:
    task.delta.apply(model)
    with torch.no_grad():
        model.wide.weight += 1
    changed = state(model)
    with pytest.raises(DeltaError, match=r"wide.weight was changed after the delta was applied"):
        task.delta.revert(model)
    assert same_bits(state(model), changed)
    model.load_state_dict(task.original)
    task.delta.apply(model)
    assert same_bits(state(model), task.tuned)


def test_running_statistics_may_move_between(model: Small) -> None:
    task = made_up(model, choose(anatomy_of(model), 1), buffers=True)
    with task.delta.applied_to(model):
        model.batch_norm.train()(torch.randn(3, 6, 2, 2))
    assert bits(model.batch_norm.running_mean) == bits(task.original["batch_norm.running_mean"])


# ---- files --------------------------------------------------------------------------------------------------------


def test_file_is_valid_safetensors_and_says_what_it_is(task: Task, tmp_path: Path) -> None:
    task.delta.save(tmp_path / "birds.safetensors")
    with safe_open(tmp_path / "birds.safetensors", "pt") as file:
        assert {"model", "fingerprint", "places"} <= set(file.keys())
        header = file.metadata()["fewtune"]
    assert '"format": "fewtune-delta", "version": 1, "checksum": "' in header
    assert '"name": "birds"' in header


def test_metadata_survives(task: Task, tmp_path: Path) -> None:
    task.delta.save(tmp_path / "birds.safetensors")
    assert load_delta(str(tmp_path / "birds.safetensors")).metadata == {
        "name": "birds",
        "nested": {"a": [1, None, 0.5]},
    }


def test_metadata_is_a_copy_and_plain_json(model: Small) -> None:
    mine = {"sizes": (224, 224), "mean": [0.5]}
    delta = made_up(model, choose(anatomy_of(model), 1), metadata=mine).delta
    mine["mean"].append(1)
    assert delta.metadata == {"sizes": [224, 224], "mean": [0.5]}


@pytest.mark.parametrize("bad", [{"a": torch.ones(1)}, {"a": float("nan")}, {1: "a"}, {"a": {1, 2}}])
def test_metadata_that_is_no_json(model: Small, bad: dict) -> None:
    with pytest.raises(DeltaError, match="metadata must be JSON values by name"):
        made_up(model, choose(anatomy_of(model), 1), metadata=bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_choice(model: Small, task: Task, tmp_path: Path, dtype: torch.dtype) -> None:
    task.delta.save(tmp_path / "half.safetensors", dtype=dtype)
    half = load_delta(tmp_path / "half.safetensors")
    assert half.selection() == task.delta.selection()
    assert half.fingerprint == task.delta.fingerprint
    half.apply(model)
    touched = {n: t.to(dtype).to(t.dtype) for n, t in task.tuned.items()}
    for name, places in task.delta.selection().places.items():
        at = torch.unravel_index(
            task.delta.selection().anatomy.views[name].stored_index(places.flat), model.get_parameter(name).shape
        )
        expected = task.original[name].clone()
        expected[at] = touched[name][at]
        assert bits(model.get_parameter(name)) == bits(expected)
    for name in half.whole:
        assert bits(model.get_parameter(name)) == bits(touched[name])
    half.revert(model)
    assert same_bits(state(model), task.original)
    assert os.path.getsize(tmp_path / "half.safetensors") < len(to_bytes(task.delta))


def test_half_precision_beyond_its_range(model: Small) -> None:
    selection = choose(anatomy_of(model), 1)
    tuned = dict(model.named_parameters())
    tuned["linear.bias"] = tuned["linear.bias"].detach() + 1e5
    before = {n: model.get_parameter(n).detach().reshape(-1)[: len(p)] for n, p in selection.places.items()}
    before |= {n: model.get_parameter(n).detach() for n in selection.whole}
    delta = take(selection, tuned, before)
    with pytest.raises(DeltaError, match=r"linear.bias has values beyond the range of float16"):
        to_bytes(delta, torch.float16)
    assert from_bytes(to_bytes(delta, torch.bfloat16)).whole["linear.bias"].dtype is torch.bfloat16
    with pytest.raises(DeltaError, match=r"expected torch.float16, torch.bfloat16 or None"):
        to_bytes(delta, torch.float32)


def test_writing_is_atomic(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "task.safetensors"
    task.delta.save(path)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = replace(task.delta, metadata={"other": 1})
    with pytest.raises(DeltaError, match="cannot be written: No space left on device"):
        other.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    other.save(path)
    assert load_delta(path).metadata == {"other": 1}


def test_a_write_that_fails_midway_is_undone(model: Small, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewtune.delta import apply as writing

    plain, calls = writing.write, []

    def failing(*args: object) -> None:
        calls.append(args)
        plain(*args)
        if len(calls) == 4:
            raise RuntimeError("device lost")

    monkeypatch.setattr(writing, "write", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        task.delta.apply(model)
    assert len(calls) == 8
    assert same_bits(state(model), task.original)
    assert applied(model) is None


def test_a_layer_without_connections_is_left_out(model: Small) -> None:
    selection = choose(anatomy_of(model), 1)
    empty = Places(7, 9, torch.empty(0, dtype=torch.int64))
    task = made_up(model, replace(selection, places={**selection.places, "linear.weight": empty}))
    assert "linear.weight" not in task.delta.values
    assert from_bytes(to_bytes(task.delta)) == task.delta
