"""A shared part and a task's own part on top of it: two exact writes, and one delta with the effect of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from delta_cases import Small, anatomy_of, choose, made_up
from fewtune.delta import Delta, applied, load_delta
from fewtune.delta.levels import flatten, merge_shared, shared_of, stands_on
from fewtune.errors import DeltaError
from fewtune.selection import Selection
from fewtune.sharing.shares import without


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def small(classes: int = 3) -> Small:
    """The same backbone whatever the head's size."""
    model = Small(classes)
    model.load_state_dict({n: t for n, t in Small().state_dict().items() if not n.startswith("head")}, strict=False)
    return model


@pytest.fixture
def levels(tmp_path: Path) -> tuple[Delta, Delta, Path]:
    """A shared part of two connections a neuron, a task of one more, its biases and three classes, and its file."""
    anatomy = anatomy_of(small(1))
    places = choose(anatomy, 2).places
    shared = made_up(small(1), Selection(anatomy, places, {}), seed=1, buffers=True).delta
    shared.save(tmp_path / "shared.safetensors")
    model = small()
    head = model.head.weight.clone()
    merge_shared(model, shared)
    assert torch.equal(model.head.weight, head)
    own = without(choose(anatomy_of(model), 1, seed=5), shared.selection())
    task = made_up(model, own, seed=2, metadata=stands_on(tmp_path / "shared.safetensors")).delta
    folder = tmp_path / "birds"
    folder.mkdir()
    task.save(folder / "delta.safetensors")
    return shared, task, folder / "delta.safetensors"


def test_both_writes_and_both_ways_back_are_exact(levels: tuple[Delta, Delta, Path]) -> None:
    _, made, file = levels
    task = load_delta(file)
    shared = shared_of(task.metadata, file)
    assert shared is not None
    model = small(5)
    before = state(model)
    shared.apply(model)
    between = state(model)
    task.apply(model, on=shared)
    assert applied(model) == task
    present = model.state_dict()
    for name, index in made.positions.items():
        stored = present[name].reshape(-1)
        assert torch.equal(stored if index is None else stored[index], made.new(name).reshape(-1))
    with pytest.raises(DeltaError, match="another delta is applied"):
        shared.revert(model)
    task.revert(model)
    assert applied(model) == shared
    assert same(state(model), between)
    shared.revert(model)
    assert same(state(model), before)
    assert applied(model) is None


def test_a_task_is_refused_without_its_shared_part(levels: tuple[Delta, Delta, Path]) -> None:
    shared, task, file = levels
    model = small()
    before = state(model)
    with pytest.raises(DeltaError, match=r"stands on the shared part shared\.safetensors"):
        task.apply(model)
    with pytest.raises(DeltaError, match="is not applied to the model"):
        task.apply(model, on=shared)
    assert same(state(model), before)
    beside = file.parent.parent / "shared.safetensors"
    beside.rename(beside.with_name("other.safetensors"))
    with pytest.raises(DeltaError, match=r"shared part shared\.safetensors .*neither in"):
        shared_of(task.metadata, file)
    task.save(beside)  # some other file of that name
    with pytest.raises(DeltaError, match="another one lies at"):
        shared_of(task.metadata, file)
    with pytest.raises(DeltaError, match="damaged"):
        shared_of({"shared": {"file": "../escape.safetensors", "sha256": "0"}}, file)


def test_one_delta_has_the_effect_of_both(levels: tuple[Delta, Delta, Path], tmp_path: Path) -> None:
    shared, task, _ = levels
    model, plain = small(), small()
    flat = flatten(plain, shared, task)
    assert same(state(plain), state(small()))
    shared.apply(model)
    task.apply(model, on=shared)
    flat.save(tmp_path / "flat.safetensors")
    read = load_delta(tmp_path / "flat.safetensors")
    assert "shared" not in read.metadata
    with read.applied_to(plain):
        assert same(state(plain), state(model))
    assert read.connections == shared.connections + task.connections


def test_a_task_on_a_shared_part_is_swapped(levels: tuple[Delta, Delta, Path]) -> None:
    shared, task, _ = levels
    model = small()
    merge_shared(model, shared)
    other = made_up(model, choose(anatomy_of(model), 1, seed=9), seed=3).delta
    model = small()
    before = state(model)
    shared.apply(model)
    task.apply(model, on=shared)
    task.swap(model, other)
    assert applied(model) == other
    other.revert(model)
    shared.revert(model)
    assert same(state(model), before)


def test_the_shared_connections_are_no_task_s_own() -> None:
    anatomy = anatomy_of(small())
    shared, wanted = choose(anatomy, 2), choose(anatomy, 3)
    own = without(wanted, shared)
    for name, places in own.places.items():
        if name in shared.places:
            assert not torch.isin(places.flat, shared.places[name].flat).any()
    assert own.connections == wanted.connections - (wanted & shared).connections
