"""Attached models in the layouts and modes that training uses, and what detach leaves behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attaching import (
    CLASSES,
    SmallConvNet,
    assert_trains_alike,
    batch,
    choose,
    cross_entropy_step,
    largest_difference,
    same_bits,
    small_convnet,
    small_vit,
    state_of,
    train_both,
)
from fewtune.tuning import attach

# ---- layouts and modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(when: str) -> None:
    def step(network: nn.Module, number: int) -> None:
        images, labels = batch(number)
        F.cross_entropy(network(images.to(memory_format=torch.channels_last)), labels).backward()

    model = small_convnet().double().eval()
    if when == "before":
        model.to(memory_format=torch.channels_last)
    selection = choose(model)
    reference = copy.deepcopy(model)
    tuner, dense = train_both(copy.deepcopy(model), selection, step)
    after = attach(model, selection)
    model.to(memory_format=torch.channels_last)
    assert model._modules["middle"]._parameters["weight"].is_contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(after.parameters(), lr=0.1)
    for number in range(3):
        optimizer.zero_grad()
        step(model, number)
        optimizer.step()
    tuner.detach()
    after.detach()
    assert largest_difference(tuner.model, dense) < 1e-10
    assert largest_difference(model, dense) < 1e-10
    assert not torch.equal(model.middle.weight, reference.middle.weight)


def by_hand(model: nn.Module) -> None:
    """Modes set module by module, as Lightning does after validation."""
    for module in model.modules():
        module.training = True


@pytest.mark.parametrize("set_mode", [nn.Module.train, by_hand])
def test_running_statistics_stay_frozen_in_training_mode(set_mode: Callable[[nn.Module], None]) -> None:
    model = small_convnet().eval()
    images = batch(dtype=torch.float32)[0]
    with torch.no_grad():
        expected = model(images)
    before = state_of(model)
    tuner = attach(model, choose(model))
    set_mode(model)
    assert model.training
    assert torch.equal(model(images), expected)
    assert same_bits({n: b for n, b in state_of(model).items() if "running" in n or "tracked" in n},
                     {n: b for n, b in before.items() if "running" in n or "tracked" in n})  # fmt: skip
    copied = copy.deepcopy(model)
    set_mode(copied)
    assert torch.equal(copied(images), expected)
    tuner.detach()
    assert model.norm1.training
    assert not torch.equal(model(images), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_detach_restores_the_mode(mode: bool) -> None:
    model = small_convnet().train(mode)
    attach(model, choose(model)).detach()
    assert model.norm1.training is mode
    tuner = attach(model, choose(model))
    model.train(not mode)
    tuner.detach()
    assert model.norm1.training is not mode


def test_running_statistics_can_be_updated() -> None:
    model, other = small_convnet(), small_convnet()
    before = state_of(model)
    tuner = attach(model, choose(model), running_statistics="update")
    others = attach(other, choose(other), running_statistics="update")
    model(batch(dtype=torch.float32)[0])
    changed = {n for n, t in model.state_dict().items() if "norm" in n and not torch.equal(t, before.get(n, t))}
    assert changed == {f"norm{i}.{b}" for i in (1, 2) for b in ("running_mean", "running_var", "num_batches_tracked")}
    state = tuner.state_dict()
    assert set(state["buffers"]) == changed
    others.load_state_dict(state)
    assert same_bits(state_of(other), state_of(model))
    delta = tuner.delta()
    tuner.detach(keep=False)
    assert same_bits(state_of(model), before)
    delta.apply(model)
    assert torch.equal(model.norm1.running_mean, state["buffers"]["norm1.running_mean"])
    delta.revert(model)
    assert same_bits(state_of(model), before)


def test_statistics_of_the_head_are_trained() -> None:
    class WithNormInHead(SmallConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, CLASSES))

    model = WithNormInHead()
    attach(model, choose(model))
    model(batch(dtype=torch.float32)[0])
    assert model.head[0].num_batches_tracked == 1
    assert model.norm1.num_batches_tracked == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_inside_training(context: Callable) -> None:
    """Evaluation between and within passes sees the trained values and disturbs no gradient."""
    model = small_vit()
    tuner = attach(model, choose(model))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    cross_entropy_step(model, 0)
    optimizer.step()
    images, labels = batch(dtype=torch.float32)
    output = model(images)
    with context():
        assert torch.equal(model(images), output)
        tuner.sync()
        tuner.plain_state_dict()
        with torch.enable_grad():
            model(images)
    F.cross_entropy(output, labels).backward()
    with context():
        tuner.load_state_dict(tuner.state_dict())
    cross_entropy_step(model, 1)
    optimizer.step()


class Attentive(nn.Module):
    """torch's own attention and encoder layer, which have fast paths of their own in evaluation."""

    def __init__(self, packed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 8)
        widths = {} if packed else {"kdim": 16, "vdim": 16}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.head = nn.Linear(8, CLASSES)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)[:, :10]
        embedded = self.embed(tokens)
        memory = embedded if self.packed else tokens
        mixed = self.attention(embedded, memory, memory, need_weights=False)[0]
        return self.head(self.encoder(embedded + mixed).mean(1))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_of_torch(packed: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Attentive(packed).double().train(training)
    assert_trains_alike(model)
    tuner = attach(model.eval(), choose(model, seed=5))
    images = batch()[0]
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter += 0.1
        fast = model(images)  # torch's fast path, which reads the weights alone
    slow = model(images)
    assert slow.requires_grad
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-10, atol=1e-10)


def test_functional_call() -> None:
    """Parameters passed in by name are those that are used and that get the gradient; the model keeps its own."""
    model = small_vit().double()
    tuner = attach(model, choose(model))
    images = batch()[0]
    output = model(images)
    state = state_of(model)
    own = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, own, images), output)
    other = {n: (p.detach() + 0.05).requires_grad_() for n, p in own.items() if p.requires_grad}
    changed = torch.func.functional_call(model, other, images)
    changed.square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for n, t in other.items() if "head" not in n)
    assert all(p.grad is None for p in tuner.parameters())
    assert torch.equal(model(images), output)
    assert same_bits(state_of(model), state)
    with torch.no_grad():
        for name, parameter in own.items():
            if name in other:
                parameter.copy_(other[name])
    assert torch.equal(model(images), changed)


# ---- what is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_detach_frees_what_was_attached(keep: bool) -> None:
    """No values, no indices and no copy of anything stay alive, though tuner and optimizer of the user do."""
    model = small_vit()
    tuner = attach(model, choose(model))
    cross_entropy_step(model, 0)
    indices = [
        weakref.ref(s.index) for m in model.modules() if hasattr(m, "_fewtune") for s in m._fewtune.tuned.values()
    ]
    names = set(tuner.selection.places)
    values = [weakref.ref(p) for n, p in tuner.named_parameters().items() if n in names]
    before = [weakref.ref(t.before) for t in tuner._trained.values()]
    tuner.detach(keep=keep)
    gc.collect()
    for kind in (indices, values, before):
        assert kind
        assert all(ref() is None for ref in kind)


def test_an_attached_model_is_freed_with_its_tuner() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    optimizer = torch.optim.Adam(tuner.parameters())
    cross_entropy_step(model, 0)
    optimizer.step()
    alive = weakref.ref(model.blocks[0].attn.qkv)
    del model, tuner, optimizer
    gc.collect()
    assert alive() is None
