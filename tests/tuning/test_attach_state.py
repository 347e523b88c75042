"""What attach leaves alone in a model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from attaching import (
    batch,
    choose,
    cross_entropy_step,
    same_bits,
    small_convnet,
    small_vit,
    state_of,
)
from fewtune.errors import TuningError
from fewtune.tuning import attach
from fewtune.tuning.layers import SWAPPED, Tuned


def test_structure_while_attached_and_after() -> None:
    model = small_convnet()
    model.norm1.weight.requires_grad_(False)
    classes = {name: type(m) for name, m in model.named_modules()}
    dictionaries = {name: set(m.__dict__) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    before = state_of(model)
    tuner = attach(model, choose(model))
    assert tuner.model is model
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in tuner.parameters()}
    assert len(trainable) == len(tuner.parameters())
    assert model.middle._parameters["weight"].requires_grad is False
    assert model.middle.weight_selected.shape == (8, 2)
    cross_entropy_step(model, 0)
    tuner.detach(keep=False)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == dictionaries
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(p.grad is None for p in model.parameters())
    assert same_bits(state_of(model), before)


def test_no_hook_survives_and_no_module_stays_registered() -> None:
    model = small_vit()

    def hooks() -> list[int]:
        return [len(v) for m in model.modules() for k, v in m.__dict__.items() if "hook" in k and v is not None]

    got = hooks()
    tuner = attach(model, choose(model))
    assert any(m in SWAPPED for m in model.modules())
    tuner.detach()
    assert hooks() == got
    assert not any(m in SWAPPED for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    cross_entropy_step(model, 0)
    optimizer.step()  # plain training is plain again: every weight moves
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])


def test_attached_again_after_detach() -> None:
    model = small_vit()
    first = attach(model, choose(model, seed=1))
    first.detach()
    before = state_of(model)
    second = attach(model, choose(model, k=3, seed=2))
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    cross_entropy_step(model, 0)
    optimizer.step()
    second.detach(keep=False)
    assert same_bits(state_of(model), before)


def test_errors() -> None:
    model, selection = small_vit(), choose(small_vit())
    tuner = attach(model, selection)
    with pytest.raises(TuningError, match="attached to this model already; detach"):
        attach(model, selection)
    with pytest.raises(TuningError, match="attached to this model already"):
        attach(model.blocks, selection)
    tuner.detach()
    uses = (
        tuner.detach, tuner.parameters, tuner.named_parameters, tuner.param_groups, tuner.state_dict, tuner.delta,
        tuner.plain_state_dict, tuner.sync, lambda: tuner.load_state_dict({}),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(TuningError, match="detached"):
            use()
    with pytest.raises(TuningError, match="running_statistics='none'; expected 'frozen' or 'update'"):
        attach(model, selection, running_statistics="none")  # type: ignore[arg-type]


def test_a_module_that_was_replaced() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    own, model.blocks[0].mlp.fc1 = model.blocks[0].mlp.fc1, nn.Linear(16, 64, bias=False)
    with pytest.raises(TuningError, match=r"no parameter 'blocks\.0\.mlp\.fc1\.bias' any more"):
        tuner.detach()
    model.blocks[0].mlp.fc1 = own
    tuner.detach()
    assert type(own) is nn.Linear


def test_data_parallel_is_refused() -> None:
    model = small_vit()
    attach(model, choose(model))
    with pytest.raises(TuningError, match="use DistributedDataParallel"):
        model.blocks[0].attn.qkv._replicate_for_data_parallel()


def test_a_selection_of_another_model() -> None:
    selection = choose(small_vit())
    renamed = small_vit()
    renamed.layers = renamed.blocks
    del renamed.blocks
    before = state_of(renamed)
    with pytest.raises(TuningError, match=r"no parameter 'blocks\.0\.\S+' \(did you mean 'layers\.0"):
        attach(renamed, selection)
    wider = small_vit(embed_dim=32)
    with pytest.raises(TuningError, match=r"has shape .*32.*, expected .*16"):
        attach(wider, selection)
    for model in (renamed, wider):
        assert all(p.requires_grad for p in model.parameters())
        assert not any(isinstance(m, Tuned) for m in model.modules())
    assert same_bits(state_of(renamed), before)


@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_differentiating_twice_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    tuner = attach(model, choose(model))
    loss = model(batch(dtype=torch.float32)[0]).square().mean()
    with pytest.raises(TuningError, match="create_graph=True"):
        torch.autograd.grad(loss, tuner.parameters(), create_graph=True)
