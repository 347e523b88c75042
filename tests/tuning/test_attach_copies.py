"""Copies, files and states of attached models."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attaching import (
    batch,
    choose,
    cross_entropy_step,
    same_bits,
    small_convnet,
    small_vit,
    state_of,
    timm_vit,
)
from fewtune.errors import TuningError
from fewtune.tuning import attach
from fewtune.tuning.layers import Tuned


@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_copies_are_independent_and_trainable(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    attach(model, choose(model))
    cross_entropy_step(model, 0)
    copied = copy.deepcopy(model)
    original = state_of(model)
    assert same_bits(state_of(copied), original)
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1)
    optimizer.zero_grad()
    images = batch(dtype=torch.float32)[0]
    output = copied(images)
    cross_entropy_step(copied, 1)
    optimizer.step()
    assert same_bits(state_of(model), original)
    with torch.no_grad():
        assert torch.equal(model(images), output)
        assert not torch.equal(copied(images), output)
    theirs = state_of(copied)
    mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    mine.step()
    assert same_bits(state_of(copied), theirs)


def test_a_copied_tuner_has_the_copied_model() -> None:
    model = small_vit()
    before = state_of(model)
    tuner = copy.deepcopy(attach(model, choose(model)))
    assert tuner.model is not model
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    cross_entropy_step(tuner.model, 0)
    optimizer.step()
    tuner.detach(keep=True)
    assert isinstance(model.head, nn.Linear)
    assert any(isinstance(m, Tuned) for m in model.modules())
    assert not any(isinstance(m, Tuned) for m in tuner.model.modules())
    changed = [n for n, t in tuner.model.state_dict().items() if not torch.equal(t, before[n])]
    assert set(tuner.selection.places) <= set(changed)


LOADING = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model, tuner = saved["model"], saved["tuner"]
output = model(saved["images"])
assert torch.equal(output, saved["output"]), "another output"
optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
output.square().mean().backward()
optimizer.step()
with torch.no_grad():
    assert not torch.equal(model(saved["images"]), saved["output"]), "a step changed nothing"
tuner.detach(keep=True)
torch.save(model, sys.argv[1])
"""


def test_a_saved_model_loads_and_trains_in_another_process(tmp_path) -> None:
    model = timm_vit()
    tuner = attach(model, choose(model))
    images = torch.randn(2, 3, 32, 32)
    path = tmp_path / "model.pt"
    torch.save({"model": model, "tuner": tuner, "images": images, "output": model(images).detach()}, path)
    done = subprocess.run([sys.executable, "-c", LOADING, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain = torch.load(path, weights_only=False)
    assert type(plain) is type(timm_vit())
    assert plain.state_dict().keys() == timm_vit().state_dict().keys()


def test_own_state_of_the_model() -> None:
    """One more key a tuned layer; loading it restores values and weights."""
    model, other = small_vit(), small_vit()
    selection = choose(model)
    plain = set(model.state_dict())
    tuner, others = attach(model, selection), attach(other, selection)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    cross_entropy_step(model, 0)
    optimizer.step()
    state = state_of(model)
    assert set(state) - plain == {f"{name}_selected" for name in selection.places}
    other.load_state_dict(state)
    assert same_bits(state_of(other), state)
    assert same_bits(tuner.state_dict()["values"], others.state_dict()["values"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_loads_while_attached(assign: bool) -> None:
    model, tuned = small_vit(), small_vit()
    for parameter in tuned.parameters():
        parameter.data.add_(1.0)
    tuner = attach(model, choose(model))
    model.load_state_dict(tuned.state_dict(), assign=assign)
    for name, places in tuner.selection.places.items():
        values = tuner.named_parameters()[name]
        assert values.requires_grad
        assert torch.equal(values.detach().reshape(-1), tuned.state_dict()[name].reshape(-1)[places.flat])
    assert same_bits({n: t.detach() for n, t in tuner.plain_state_dict().items()}, state_of(tuned))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({n: t for n, t in tuned.state_dict().items() if "qkv" not in n})


def test_compact_state() -> None:
    model, other = small_vit(), small_vit()
    tuner, others = attach(model, choose(model)), attach(other, choose(other))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    cross_entropy_step(model, 0)
    optimizer.step()
    state = tuner.state_dict()
    assert sum(t.numel() for part in state.values() for t in part.values()) == tuner.trained
    optimizer.step()  # the state is a copy
    assert not torch.equal(state["values"]["head.weight"], model.head.weight)
    others.load_state_dict(state)
    tuner.load_state_dict(state)
    assert same_bits(state_of(other), state_of(model))
    with pytest.raises(TuningError, match="of another selection"):
        attach(small_vit(), choose(small_vit(), k=3)).load_state_dict(state)
    with pytest.raises(TuningError, match="of another selection"):
        attach(small_vit(), choose(small_vit(), bias="none")).load_state_dict(state)


def test_plain_state_loads_strictly_into_timm() -> None:
    model = timm_vit()
    tuner = attach(model, choose(model))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    images = torch.randn(2, 3, 32, 32)
    model(images).square().mean().backward()
    optimizer.step()
    fresh = timm_vit()
    fresh.load_state_dict(tuner.plain_state_dict(), strict=True)
    model.eval()
    fresh.eval()
    assert torch.equal(fresh(images), model(images))


def test_taking_a_state_between_forward_and_backward() -> None:
    """A checkpoint, a switch of mode or a sync that changes nothing must not spoil the pending backward pass."""
    model = small_vit()
    tuner = attach(model, choose(model))
    images, labels = batch(dtype=torch.float32)
    loss = F.cross_entropy(model(images), labels)
    model.state_dict()
    tuner.plain_state_dict()
    tuner.delta()
    tuner.sync()
    model.eval()
    with torch.no_grad():
        model(images)
    model.train()
    loss.backward()
    assert all(p.grad is not None for p in tuner.parameters())


def test_stepping_between_forward_and_backward_is_an_error_as_without_attach() -> None:
    model = small_vit().double()
    tuner = attach(model, choose(model))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    images, labels = batch()
    first, second = F.cross_entropy(model(images), labels), F.cross_entropy(model(images), labels)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
