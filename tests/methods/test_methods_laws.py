"""The laws that every method which adds modules must pass, on every family of models that it knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewtune.errors import ModelError, TuningError
from fewtune.methods import Adapter, Inserted
from fewtune.methods.ssf import ScaleShift, channel_axis
from fewtune.models import logits
from methods_cases import (
    HEADS,
    IDENTICAL,
    IMPOSSIBLE,
    MERGED,
    METHODS,
    PAIRS,
    labels,
    output,
    pictures,
    plain_model,
    refused,
    train,
    tuned,
)

every = pytest.mark.parametrize(("method", "kind"), PAIRS)
FAMILIES = ("vit", "swin", "convnext", "efficientnet")
some = pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[1] in FAMILIES])


@every
def test_the_model_begins_as_it_was_where_the_method_promises_it(method: str, kind: str) -> None:
    before = output(plain_model(kind), kind)
    after = output(tuned(method, kind).model, kind)
    assert torch.equal(before, after) == (method in IDENTICAL)


@every
def test_only_what_the_method_names_is_trained(method: str, kind: str) -> None:
    """Everything else keeps its bits through steps with weight decay, and gets no gradient."""
    tuner, before = tuned(method, kind), plain_model(kind).state_dict()
    named = tuner.named_parameters()
    trained = {id(parameter) for parameter in tuner.parameters()}
    assert all(parameter.requires_grad is (id(parameter) in trained) for parameter in tuner.model.parameters())
    assert len(named) == len(trained)
    begun = {name: parameter.detach().clone() for name, parameter in named.items()}
    train(tuner, kind)
    still = [name for name, parameter in named.items() if torch.equal(parameter, begun[name])]
    assert not still
    assert all(p.grad is None for p in tuner.model.parameters() if id(p) not in trained)
    after = tuner.plain_state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    places = tuner.method.arrays()
    head = {name for name in before if name.startswith(f"{HEADS[kind]}.")}
    assert changed == head | set(places) | set(getattr(tuner.method, "whole", ()))
    for name, flat in places.items():
        moved = (before[name] != after[name]).reshape(-1).nonzero().squeeze(1)
        assert set(moved.tolist()) <= set(flat.tolist())


@every
def test_every_trained_number_is_counted_and_in_a_group(method: str, kind: str) -> None:
    tuner = tuned(method, kind)
    body, head = tuner.param_groups(lr=1e-3, head_lr=2e-3)
    assert (body["lr"], head["lr"]) == (1e-3, 2e-3)
    counts = [sum(p.numel() for p in group["params"]) for group in (body, head)]
    assert counts[1] == sum(p.numel() for p in plain_model(kind).get_submodule(HEADS[kind]).parameters())
    assert tuner.trained == sum(counts) > counts[1] > 0
    plain = sum(p.numel() for p in plain_model(kind).parameters())
    assert tuner.backbone_parameters == plain - counts[1]


@every
def test_merged_outputs_equal_unmerged_ones(method: str, kind: str) -> None:
    """Also for what cannot be merged: it says so."""
    tuner = tuned(method, kind)
    train(tuner, kind)
    if method not in MERGED and not (method == "spt-adapter" and not tuner.added.modules):
        with pytest.raises(TuningError, match="no plain checkpoint"):
            tuner.merged_state_dict()
        return
    plain = plain_model(kind, seed=99)
    plain.load_state_dict(tuner.merged_state_dict(), strict=True)
    own = output(tuner.model, kind)
    assert (own - output(plain_model(kind), kind)).abs().max() > 1e-3
    torch.testing.assert_close(output(plain, kind), own, rtol=0, atol=1e-12)


@every
def test_a_seed_decides_the_new_numbers_and_nothing_else_does(method: str, kind: str) -> None:
    first = tuned(method, kind, seed=4).state_dict()["added"]
    torch.manual_seed(1234)
    model = plain_model(kind)
    inserted = METHODS[method](model, kind)
    state = torch.get_rng_state()
    again = Inserted(model, (HEADS[kind],), inserted, seed=4).state_dict()["added"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = tuned(method, kind, seed=5).state_dict()["added"]
    assert not first or not all(torch.equal(first[name], other[name]) for name in first)


@every
def test_the_compact_state_goes_on_where_it_was(method: str, kind: str) -> None:
    tuner, other = tuned(method, kind), tuned(method, kind, seed=7)
    train(tuner, kind)
    state = tuner.state_dict()
    assert sum(t.numel() for group in ("added", "values") for t in state[group].values()) == tuner.trained
    other.load_state_dict(state)
    assert torch.equal(output(other.model, kind), output(tuner.model, kind))
    train(tuner, kind, 1)
    assert not torch.equal(output(other.model, kind), output(tuner.model, kind))


@some
def test_a_copy_calls_its_own_modules(method: str, kind: str) -> None:
    tuner = tuned(method, kind)
    train(tuner, kind, 1)
    twin = copy.deepcopy(tuner.model)
    before = output(twin, kind)
    assert torch.equal(before, output(tuner.model, kind))
    train(tuner, kind, 1)
    assert torch.equal(output(twin, kind), before)
    assert not torch.equal(output(tuner.model, kind), before)


@some
def test_autocast_and_drop_path(method: str, kind: str) -> None:
    """Half precision by autocast, in a model that drops paths: finite gradients of all that is trained."""
    tuner = tuned(method, kind, drop_path_rate=0.3)
    model = tuner.model.float().train()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model(pictures(kind).float()))
    F.cross_entropy(got.float(), labels()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in tuner.parameters())
    assert got.dtype is torch.bfloat16


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@some
def test_data_parallel_finds_every_trained_parameter_used(method: str, kind: str, group: None) -> None:
    """DDP refuses the second step where a parameter had no part in the first."""
    tuner = tuned(method, kind)
    model = nn.parallel.DistributedDataParallel(tuner.model.train())
    for _ in range(2):
        F.cross_entropy(logits(model(pictures(kind))), labels()).backward()
    assert all(parameter.grad is not None for parameter in tuner.parameters())


@some
def test_recomputed_activations_give_the_same_gradients(method: str, kind: str) -> None:
    grown = []
    for recompute in (False, True):
        tuner = tuned(method, kind)
        train(tuner, kind, 1)
        tuner.model.set_grad_checkpointing(recompute)
        tuner.model.train()
        torch.manual_seed(0)
        loss = F.cross_entropy(tuner.model(pictures(kind)), labels())
        if recompute and (method, kind) == ("vpt-shallow", "swin"):
            with pytest.raises(TuningError, match="leave checkpoint_activations out"):
                loss.backward()
            return
        tuner.model.zero_grad()
        loss.backward()
        grown.append([parameter.grad for parameter in tuner.parameters()])
    for plain, again in zip(*grown, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(("method", "kind"), sorted(IMPOSSIBLE))
def test_what_a_method_cannot_do_is_one_clear_error(method: str, kind: str) -> None:
    assert "take another method" in refused(method, kind) or "no attention" in refused(method, kind)


class Convolutions(nn.Module):
    """Of a family that no method knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["adapter", "lora", "vpt-shallow", "vpt-deep", "ssf"])
def test_an_unknown_architecture_is_refused_and_the_known_ones_are_named(method: str) -> None:
    model = Convolutions()
    with pytest.raises(ModelError, match=f"{method} .*it knows ViT, Swin and ConvNeXt"):
        Inserted(model, ("head",), METHODS[method](model, "vit"))


def test_a_model_without_a_head_and_a_method_put_in_twice_are_refused() -> None:
    with pytest.raises(ModelError, match="needs to know the head"):
        Inserted(plain_model("vit"), (), Adapter())
    tuner = tuned("adapter", "vit")
    with pytest.raises(TuningError, match="already"):
        Inserted(tuner.model, ("head",), Adapter())


@pytest.mark.parametrize("axis", [-1, 1])
def test_scale_and_shift_are_along_the_channels(axis: int) -> None:
    pair, x = ScaleShift(4, axis).double(), torch.randn(2, 4, 5, 4, dtype=torch.double)
    got = pair(x)
    for channel in range(4):
        expected = x.select(axis, channel) * pair.scale[channel] + pair.shift[channel]
        assert torch.equal(got.select(axis, channel), expected)


@pytest.mark.parametrize(("layer", "axis"), [(nn.BatchNorm2d, 1), (nn.LayerNorm, -1)])
@pytest.mark.parametrize("width", [2, 3, 1280])
def test_the_input_on_which_a_normalisation_is_tried_out_is_small(
    layer: type[nn.Module], axis: int, width: int
) -> None:
    seen = []
    norm = layer(width)
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    assert channel_axis(norm) == axis
    assert max(seen) <= 20 * width  # eight gigabytes at this width when height and width were about as large
