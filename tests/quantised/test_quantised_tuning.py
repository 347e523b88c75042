"""Tuning on quantised weights: the same numbers as on the float ones that they stand for, and the way back."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

import fewtune
from fewtune.errors import DeltaError, ImportanceError, TuningError
from fewtune.quantised import Overlay, dequantised, quantise, scheme
from quantising import SCHEMES, WEIGHTS, batch, dense, plain, quantised, scored, tuned

words = pytest.mark.parametrize("word", SCHEMES)


@words
def test_scores_are_those_of_the_dequantised_weights(word: str) -> None:
    net = quantised(word)
    held = [net.get_parameter(name) for name in WEIGHTS]
    kinds = [type(module) for module in net.modules()]
    ours, theirs = scored(net), scored(dense(word))
    assert {name: tuple(score.shape) for name, score in ours.items()} == {
        name: tuple(score.shape) for name, score in theirs.items()
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in WEIGHTS)
    magnitude = fewtune.magnitude_importance(net)
    assert all(torch.equal(magnitude[name], dequantised(net.get_parameter(name)).abs()) for name in WEIGHTS)
    assert all(net.get_parameter(name) is weight for name, weight in zip(WEIGHTS, held, strict=True))
    assert [type(module) for module in net.modules()] == kinds


@words
@pytest.mark.parametrize(
    "score",
    [
        lambda net: fewtune.importance.wanda_importance(net, [batch(0), batch(1)]),
        lambda net: fewtune.importance.snr_importance(net, [batch(0), batch(1)], fewtune.CrossEntropy()),
        lambda net: fewtune.importance.correlation_importance(net, [batch(0), batch(1)], fewtune.CrossEntropy()),
    ],
)
def test_so_are_the_other_criteria(word: str, score: object) -> None:
    ours, theirs = score(quantised(word)), score(dense(word))
    assert all(torch.equal(ours[name], theirs[name]) for name in WEIGHTS)


@words
def test_training_gives_the_numbers_of_the_dequantised_model(word: str) -> None:
    net = quantised(word)
    stored = {name: net.get_parameter(name) for name in WEIGHTS}
    ours, theirs = tuned(net), tuned(dense(word))
    assert all(isinstance(net.get_parameter(name), Overlay) for name in WEIGHTS)
    assert all(type(p) is nn.Parameter and p.dtype is torch.float32 for p in ours.parameters())
    state, expected = ours.plain_state_dict(), theirs.plain_state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(net.get_parameter(name).base is weight for name, weight in stored.items())
    plain().load_state_dict(state)  # floats: what any library loads


@words
def test_nothing_dense_waits_for_the_backward_pass(word: str) -> None:
    """Also of layers that nothing is selected in, and of the pass that scores."""
    net = quantised(word)
    selection = fewtune.select(scored(net), k=1, exclude=["body.2"])
    fewtune.attach(net, selection)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = net(batch()[0].requires_grad_()).sum()
    sizes = {net.get_parameter(name).numel() for name in WEIGHTS}
    assert not [t.shape for t in kept if not isinstance(t, Overlay) and t.numel() in sizes]
    assert any(isinstance(t, Overlay) for t in kept)
    loss.backward()


@words
def test_detach_puts_the_quantised_weights_back(word: str) -> None:
    net = quantised(word)
    stored, kinds = [net.get_parameter(name) for name in WEIGHTS], [type(m) for m in net.modules()]
    before = net(batch()[0])
    tuner = tuned(net)
    assert not torch.equal(net(batch()[0]), before)
    tuner.detach(keep=False)
    assert all(net.get_parameter(name) is weight for name, weight in zip(WEIGHTS, stored, strict=True))
    assert [type(m) for m in net.modules()] == kinds
    # The head was trained too: what it gives is as before to the bit, since all is.
    assert torch.equal(net(batch()[0]), before)


@words
def test_what_is_kept_is_a_model_like_any_other(word: str) -> None:
    net = quantised(word)
    tuned(net).detach(keep=True)
    expected = net(batch()[0])
    assert torch.equal(copy.deepcopy(net)(batch()[0]), expected)
    file = io.BytesIO()
    torch.save(dict(net.state_dict()), file)
    file.seek(0)
    other = quantised(word)
    tuned(other, steps=1).detach(keep=True)
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other(batch()[0]), expected)
    tuned(net, k=3).delta()  # on top of what was tuned before


@words
def test_works_in_inference_mode_too(word: str) -> None:
    net = quantised(word)
    delta, other, inputs = tuned(net).delta(), quantised(word), batch()[0]
    before = other(inputs)
    with torch.inference_mode():
        expected = net(inputs)
        delta.apply(other)
        assert torch.equal(other.to("cpu")(inputs), expected)
    delta.revert(other)
    assert torch.equal(other(inputs), before)


@words
def test_an_overlay_is_its_dense_numbers_in_every_operation(word: str) -> None:
    net = quantised(word)
    tuned(net)
    weight = net.get_parameter(WEIGHTS[0]).detach()
    dense, x = dequantised(weight), batch()[0]
    for same in (
        lambda w: x @ w.t(),
        lambda w: w.to(torch.bfloat16).view(4, -1).transpose(0, 1).contiguous(),
        lambda w: torch.cat(w.chunk(2)),
        lambda w: w.clone()[3:5].abs(),
        lambda w: torch.zeros_like(w).copy_(w),
    ):
        assert torch.equal(same(weight), same(dense))
    assert isinstance(weight.t(), Overlay)  # nothing dense until it is asked for
    moved = copy.deepcopy(net).to("meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    assert moved.get_parameter(WEIGHTS[0]).base.device.type == "meta"


def test_state_of_other_weights_is_refused() -> None:
    net = quantised("int8")
    tuned(net)
    with pytest.raises(RuntimeError, match="a quantised weight was to be changed at places that are not selected"):
        net.load_state_dict(plain(1).state_dict(), strict=False)
    with pytest.raises(TuningError, match="a quantised weight was to be changed"), torch.no_grad():
        net.get_parameter(WEIGHTS[0]).mul_(2)


@words
def test_delta_names_the_quantisation_and_applies_exactly(word: str, tmp_path) -> None:
    net = quantised(word)
    tuner = tuned(net)
    tuner.delta().save(tmp_path / "delta.safetensors")
    delta = fewtune.load_delta(tmp_path / "delta.safetensors")
    assert delta == tuner.delta()
    assert delta.quantised == dict.fromkeys(WEIGHTS, SCHEMES[word])
    other = quantised(word)
    stored, before = other.get_parameter(WEIGHTS[0]), other(batch()[0])
    for _ in range(2):
        delta.apply(other, verify="full")
        assert torch.equal(other(batch()[0]), net(batch()[0]))
        delta.revert(other)
        assert other.get_parameter(WEIGHTS[0]) is stored
        assert torch.equal(other(batch()[0]), before)
    second = tuned(quantised(word), steps=1).delta()
    delta.apply(other)
    delta.swap(other, second)
    second.revert(other)
    assert torch.equal(other(batch()[0]), before)


@words
def test_full_precision_backbone_is_known_and_the_difference_told(word: str, caplog) -> None:
    net = quantised(word)
    delta = tuned(net).delta()
    other, before = plain(), plain().state_dict()
    with caplog.at_level(logging.WARNING, "fewtune"):
        delta.apply(other)
    differences = [float((dequantised(net.get_parameter(n).base) - before[n]).abs().max()) for n in WEIGHTS]
    assert f"they differ by at most {max(differences):.2g} " in caplog.text
    assert caplog.text.count("\n") == 1
    for name, places in delta.positions.items():
        tensor = other.state_dict()[name].reshape(-1)
        assert torch.equal(tensor if places is None else tensor[places], delta.new(name).reshape(-1)), name
    delta.revert(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(DeltaError, match="another backbone"):
        delta.apply(plain(1))
    assert not any("differ" in record.message for record in caplog.records[1:])


def test_mismatches_are_one_clear_line() -> None:
    ours = tuned(quantised("int8")).delta()
    with pytest.raises(DeltaError, match=r"another backbone: .*weight has other values"):
        ours.apply(quantised("int8", seed=1))
    with pytest.raises(DeltaError, match=r"body\.0\.weight is of int8, one scale a row in this model, .* in full prec"):
        tuned(plain()).delta().apply(quantised("int8"))
    whole = quantise(plain(), "int8")
    selection = fewtune.select(fewtune.random_importance(quantised("int8")), k=1)
    for refused, error in (
        (lambda: fewtune.attach(whole, selection), TuningError),
        (lambda: ours.apply(whole), DeltaError),
    ):
        with pytest.raises(
            error, match=r"head\.weight is of int8, one scale a row, and only float .* or leave it out when"
        ):
            refused()


def test_other_schemes_are_refused_by_name() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    rounding_inputs, grouped = plain(), plain()
    torchao.quantize_(rounding_inputs.body, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ImportanceError, match=r"body\.0\.weight is of Int8Tensor: .* does not know; quantise it by"):
        scored(rounding_inputs)
    torchao.quantize_(
        grouped.body, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(8), set_inductor_config=False)
    )
    assert scheme(grouped.body[0].weight) == "int8, one scale for 8 connections"
    delta = tuned(grouped).delta()
    with pytest.raises(DeltaError, match=r"tuned on body\.0\.weight of int8, one scale for 8 .*: quantise it the same"):
        delta.apply(plain())
    with pytest.raises(
        DeltaError, match=r"is of int8, one scale a row in this model, .* quantised as int8, one scale for"
    ):
        delta.apply(quantised("int8"))
    delta.apply(plain(), verify="none")


@words
def test_quantise_gives_what_the_library_gives(word: str) -> None:
    net, expected = plain(), quantised(word)
    quantise(net, word, head=["head"])
    for name in WEIGHTS:
        assert scheme(net.get_parameter(name)) == SCHEMES[word]
        assert torch.equal(dequantised(net.get_parameter(name)), dequantised(expected.get_parameter(name)))
    assert type(net.head.weight) is nn.Parameter
    tuned(quantised(word)).delta().apply(net, verify="full")


def test_quantise_refuses() -> None:
    with pytest.raises(fewtune.FewtuneError, match="quantise='int3'; expected one of int8, nf4"):
        quantise(plain(), "int3")
    with pytest.raises(fewtune.FewtuneError, match="quantised already"):
        quantise(quantised("int8"), "int8")
    with pytest.raises(fewtune.FewtuneError, match="no linear layer outside its head"):
        quantise(nn.Sequential(nn.Conv2d(3, 4, 3)), "int8")
