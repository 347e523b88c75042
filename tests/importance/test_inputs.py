"""Scores that look at the inputs of layers, and at how batches differ, beside plain references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune import CrossEntropy, SupCon, correlation_importance, snr_importance, wanda_importance
from fewtune.errors import ImportanceError, SelectionError
from fewtune.importance import Scores
from layer_kinds import KINDS as ALL_KINDS
from layer_kinds import Functional, LayerKind, Reentered, Tied
from layer_kinds import Net as KindNet
from scored import LABELS, Batch, assert_close, batches, images, net

KINDS = {name: kind for name, kind in ALL_KINDS.items() if not kind.quantised}
"""Scores of quantised weights are those of the dequantised ones: tests/quantised."""
SEEN = {
    name: kind
    for name, kind in KINDS.items()
    if not any(
        word in name for word in ("attention", "LSTM", "GRU", "experts", "bilinear", "weight norm", "spectral", "Std")
    )
}
"""The kinds whose weights are given to linear and convolution functions."""
UNSEEN = [name for name in KINDS if name not in SEEN]
CRITERIA: dict[str, Callable[..., Scores]] = {
    "correlation": partial(correlation_importance, objective=CrossEntropy()),
    "snr": partial(snr_importance, objective=CrossEntropy()),
    "wanda": wanda_importance,
}


def data_of(kind: LayerKind, count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(6, *kind.shape, generator=generator, dtype=torch.float64), LABELS) for _ in range(count)]


def columns(layer: Any, x: Tensor) -> Tensor:
    """[connections, neurons, positions]: what the layer gives with each connection in turn at 1 and all others at 0."""
    parts = []
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        for place in range(kept.numel()):
            layer.weight.zero_()
            layer.weight.view(-1)[place] = 1.0
            bias = layer.bias
            layer.bias = None if bias is None else nn.Parameter(torch.zeros_like(bias))
            parts.append(_neurons(layer, layer(x)))
            layer.bias = bias
        layer.weight.copy_(kept)
    return torch.stack(parts)


def _neurons(layer: Any, output: Tensor) -> Tensor:
    channel = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    return output.movedim(channel, 0).flatten(1)


def reference(model: nn.Module, data: Sequence[Batch]) -> dict[str, dict[str, Tensor]]:
    """Correlation and Wanda's score of every layer, from all columns and all output gradients, written out."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    layers = {m: names[id(m.weight)] for n, m in model.named_modules() if n != "head" and _computes(m)}
    for inputs, labels in data:
        calls: list[tuple[Any, Tensor, Tensor]] = []

        def see(layer: Any, x: Any, y: Tensor, calls: list[tuple[Any, Tensor, Tensor]] = calls) -> None:
            calls.append((layer, x[0].detach(), y))

        hooks = [layer.register_forward_hook(see) for layer in layers]
        loss = F.cross_entropy(model(inputs), labels)
        for hook in hooks:
            hook.remove()
        for (layer, x, _), dy in zip(calls, torch.autograd.grad(loss, [y for _, _, y in calls]), strict=True):
            seen.setdefault(layers[layer], []).append((columns(layer, x), _neurons(layer, dy)))
    result: dict[str, dict[str, Tensor]] = {"correlation": {}, "wanda": {}}
    for name, parts in seen.items():
        x, dy = torch.cat([x for x, _ in parts], 2), torch.cat([dy for _, dy in parts], 1)
        own = (x != 0).any(2).double().argmax(1)  # the neuron of each connection
        x, dy = x[torch.arange(len(x)), own], dy[own]
        x_centred, dy_centred = x - x.mean(1, keepdim=True), dy - dy.mean(1, keepdim=True)
        weight = model.get_parameter(name).detach()
        correlation = (x_centred * dy_centred).sum(1).abs() / x.std(1, correction=0)
        result["correlation"][name] = correlation.view(weight.shape)
        result["wanda"][name] = weight.abs() * x.square().mean(1).sqrt().view(weight.shape)
    return result


def _computes(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    return known or type(module).__name__ == "Conv1D"


@pytest.mark.parametrize("name", [name for name in SEEN if name != "weight used by function"])
def test_each_equals_a_plain_reference(name: str) -> None:
    kind = SEEN[name]
    model, data = kind.net(torch.float64, 1), data_of(kind)
    if name == "batch normalisation":  # the reference's zeroed layers must not meet an output changed in place
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    expected = reference(model, data)
    for criterion, values in expected.items():
        assert_close(CRITERIA[criterion](model, data), dict(sorted(values.items())), 1e-9)


@pytest.mark.parametrize("name", list(KINDS))
def test_signal_to_noise_equals_a_plain_reference(name: str) -> None:
    kind = KINDS[name]
    model, data = kind.net(torch.float64, 1), data_of(kind)
    scores = snr_importance(model, data, CrossEntropy())
    weights = [model.get_parameter(name) for name in scores]
    grads = [torch.autograd.grad(F.cross_entropy(model(x), y), weights) for x, y in data]
    for name, of_batches in zip(scores, zip(*grads, strict=True), strict=True):
        stacked = torch.stack(of_batches)
        expected = stacked.sum(0).abs() / stacked.square().sum(0).sqrt()
        assert torch.allclose(scores[name], expected.nan_to_num(0.0), atol=1e-9)


def test_a_weight_that_other_code_uses_is_seen() -> None:
    kind = KINDS["weight used by function"]
    model, data = kind.net(torch.float64, 1), data_of(kind)

    class Called(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.qkv(x) + self.qkv(x.flip(1)))

    called = KindNet(Called(), 9, True).double()
    called.load_state_dict(model.state_dict())
    for criterion in CRITERIA.values():
        assert_close(criterion(model, data), dict(criterion(called, data)))
    assert_close(correlation_importance(model, data, CrossEntropy()), reference(called, data)["correlation"], 1e-9)


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("criterion", ["correlation", "wanda"])
def test_a_weight_that_is_not_seen_is_refused_and_can_be_left_out(name: str, criterion: str) -> None:
    kind = KINDS[name]
    model, data = kind.net(torch.float64, 1), data_of(kind)
    with pytest.raises(ImportanceError, match=r"saw none of body\..*exclude"):
        CRITERIA[criterion](model, data)
    with pytest.raises(SelectionError, match="no weight is left"):
        CRITERIA[criterion](model, data, exclude=["body.*", "body"])


def test_correlation_does_not_depend_on_units_or_offsets_of_inputs() -> None:
    """The layer computes the same: columns are scaled and shifted, its weights and bias take that back."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(7, generator=generator, dtype=torch.float64) * 100 + 0.01
    shift = 50 * torch.randn(7, generator=generator, dtype=torch.float64)

    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 5)
            self.register_buffer("scale", torch.ones(7))
            self.register_buffer("shift", torch.zeros(7))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(torch.tanh(x) * self.scale + self.shift)))

    torch.manual_seed(1)
    model = Rescaled().double()
    data = [(torch.randn(6, 7, generator=generator, dtype=torch.float64), LABELS) for _ in range(3)]
    plain = {name: of(model, data, head="head")["layer.weight"] for name, of in CRITERIA.items()}
    with torch.no_grad():
        model.scale.copy_(scale)  # type: ignore[operator]
        model.shift.copy_(shift)  # type: ignore[operator]
        model.layer.bias -= model.layer.weight / scale @ shift
        model.layer.weight /= scale
    changed = {name: of(model, data, head="head")["layer.weight"] for name, of in CRITERIA.items()}
    assert torch.allclose(changed["correlation"], plain["correlation"], rtol=1e-8)
    assert not torch.allclose(changed["wanda"], plain["wanda"], rtol=0.1)
    assert not torch.allclose(changed["snr"], plain["snr"], rtol=0.1)


def test_correlation_of_white_inputs_is_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    x = torch.cat([x, -x])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    F.cross_entropy(model(x), labels).backward()
    gradient = model[0].weight.grad.abs()
    scores = correlation_importance(model, [(x, labels)], CrossEntropy(), head="2")
    assert torch.allclose(scores["0.weight"], gradient)


def test_a_constant_column_scores_nothing() -> None:
    model, (x, labels) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(6, 4), LABELS)
    x[:, 1], x[:, 2] = 3.7, 0.0
    scores = correlation_importance(model, [(x, labels), (x, labels)], CrossEntropy(), head="2")["0.weight"]
    assert not scores[:, 1:3].any()
    assert (scores[:, [0, 3]] > 0).all()


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_order_of_batches_does_not_matter(criterion: str) -> None:
    model, data = net(), batches()
    scores = CRITERIA[criterion](model, data)
    assert_close(CRITERIA[criterion](model, data[::-1]), dict(scores))
    assert_close(CRITERIA[criterion](model, data, limit=2), dict(CRITERIA[criterion](model, data[:2])))


def test_all_positions_of_all_batches_are_one_sample() -> None:
    model, data = net(), batches(2)
    joint = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    halves = correlation_importance(model, data, CrossEntropy())  # each loss is a mean over its own half
    for name, score in correlation_importance(model, joint, CrossEntropy()).items():
        assert torch.allclose(halves[name], 2 * score)
    assert_close(wanda_importance(model, data), dict(wanda_importance(model, joint)))


@pytest.mark.parametrize("criterion", [correlation_importance, snr_importance])
def test_views_one_after_the_other_give_what_they_give_at_once(criterion: Any) -> None:
    model = net()
    views = [((images(2 * i), images(2 * i + 1)), LABELS) for i in range(3)]
    objective = SupCon(0.3, features=lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))
    assert_close(criterion(model, views, SupCon(0.3)), dict(criterion(model, views, objective)), 1e-9)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_model_is_left_as_it_was(criterion: str) -> None:
    model, data = net().train(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    CRITERIA[criterion](model, data)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert F.linear(torch.ones(1, 2), torch.ones(2, 2)).sum() == 4  # no function is watched any more


@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(criterion: str, dtype: torch.dtype) -> None:
    exact = CRITERIA[criterion](net(), batches())
    scores = CRITERIA[criterion](net(dtype), batches(dtype=dtype))
    for name, score in scores.items():
        assert score.dtype == torch.float32
        error = (score - exact[name]).abs().max() / exact[name].max()
        assert float(error) < (1e-4 if dtype == torch.float32 else 0.3)


def test_one_batch_has_no_noise() -> None:
    with pytest.raises(ImportanceError, match="there was one"):
        snr_importance(net(), batches(1), CrossEntropy())


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_mistakes(criterion: str) -> None:
    with pytest.raises(ImportanceError, match="no batch"):
        CRITERIA[criterion](net(), [])
    with pytest.raises(ImportanceError, match="limit=0"):
        CRITERIA[criterion](net(), batches(), limit=0)
    with pytest.raises(ImportanceError, match="not finite"):
        CRITERIA[criterion](net(), [(x * torch.nan, y) for x, y in batches()])


@pytest.mark.parametrize("body", [Reentered, Tied])
def test_all_uses_of_a_weight_count(body: Any) -> None:
    width = 7 if body is Reentered else 5
    torch.manual_seed(0)
    model = KindNet(body(), width).double()
    data = [(torch.randn(6, width, dtype=torch.float64), LABELS) for _ in range(2)]
    assert_close(correlation_importance(model, data, CrossEntropy()), reference(model, data)["correlation"], 1e-9)
