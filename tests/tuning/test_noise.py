"""Noise on what tuning has changed: off to the bit, the plain output in the mean, and its gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

import fewtune
from attaching import batch, choose, same_bits, small_convnet, small_vit, state_of
from fewtune.errors import TuningError
from fewtune.tuning import add_noise, attach, column_rms
from fewtune.tuning.layers import Tuned
from layer_kinds import KINDS

MODELS = {"vit": small_vit, "convnet": small_convnet}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "linear, more tokens than hot columns": (lambda: nn.Linear(40, 5), (4, 25, 40)),
    "linear, more tokens than inputs": (lambda: nn.Linear(6, 5), (4, 20, 6)),
    "conv2d, pointwise": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 2, 3)),
    "conv2d, pointwise, more positions than inputs": (lambda: nn.Conv2d(6, 5, 1, bias=False), (4, 6, 5, 4)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (4, 6, 5, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2), (4, 6, 5, 5)),
    "conv2d, same": (lambda: Conv2dSame(6, 5, 3, stride=2), (4, 6, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), (4, 6, 5, 5)),
}


def changed(model: nn.Module, units: bool = False, granularity: str = "neuron") -> fewtune.Tuner:
    """Attached, and everything that is trained moved by chance."""
    selection = choose(model, granularity=granularity)
    rms = None
    if units:
        rms = column_rms(model, [batch()], {name: selection.anatomy.views[name] for name in selection.places})
    tuner = attach(model, selection, column_rms=rms)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
    tuner.sync()
    return tuner


def gradients(model: nn.Module, tuner: fewtune.Tuner) -> list[Tensor]:
    images, labels = batch()
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), tuner.parameters()))


@pytest.mark.parametrize("kind", MODELS)
def test_off_and_in_evaluation_it_is_the_plain_model_to_the_bit(kind: str) -> None:
    model = MODELS[kind]().double().train()
    tuner = changed(model)
    plain, before = gradients(model, tuner), model(batch()[0])
    add_noise(tuner, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, tuner), plain, strict=True))
    model.eval()
    evaluated = model(batch()[0])
    add_noise(tuner, 1.0)
    assert torch.equal(model(batch()[0]), evaluated)
    model.train()
    assert not torch.equal(model(batch()[0]), before)
    with torch.no_grad():
        assert torch.equal(model(batch()[0]), before)  # nothing is learnt, so nothing is disturbed


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_those_of_the_equation(
    kind: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    net = nn.Sequential(make()).double().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    selection = fewtune.select(fewtune.random_importance(net, head=None), k=2, granularity=granularity)
    tuner = attach(net, selection)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tuner.sync()
    add_noise(tuner, 0.7)
    z = torch.randn(shape[0], before["0.weight"].shape[0], dtype=torch.float64)
    rest = [1] * (len(shape) - 2)
    z_shape = (len(z), *rest, z.shape[1]) if isinstance(net[0], nn.Linear) else (len(z), z.shape[1], *rest)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr("fewtune.tuning.noise.torch.randn", lambda shape, **options: z.view(shape))
    y = net(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    ours = torch.autograd.grad(y, [x, *tuner.parameters()], dy)
    # The equation, with whole weights
    reference = make().double()
    layer: Any = reference
    plain = tuner.plain_state_dict()
    weight = plain["0.weight"].clone().requires_grad_()
    bias = plain["0.bias"].clone().requires_grad_() if "0.bias" in plain else None

    def run(w: Tensor, b: Tensor | None) -> Tensor:
        if isinstance(layer, Conv2dSame):
            return F.conv2d(F.pad(x, [1, 1, 1, 1]), w, b, 2)
        return F.linear(x, w, b) if isinstance(layer, nn.Linear) else layer._conv_forward(x, w, b)

    shift = None if bias is None else bias - before["0.bias"]
    expected = run(before["0.weight"], before.get("0.bias")) + (1 + 0.7 * z.view(z_shape)) * run(
        weight - before["0.weight"], shift
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(expected, [x, weight, *([] if bias is None else [bias])], dy)
    places, view = selection.places["0.weight"], selection.anatomy.views["0.weight"]
    selected = view.matrix(theirs[1]).reshape(-1)[places.flat].view(ours[1].shape)
    for a, b in zip(ours, (theirs[0], selected, *theirs[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_depthwise_convolutions_stay_plain() -> None:
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1)).train()
    tuner = attach(net, fewtune.select(fewtune.random_importance(net, head=None), k=1))
    add_noise(tuner, 0.8)
    layers: list[Any] = list(net)
    assert [layer._fewtune.noise and layer._fewtune.noise.sigma for layer in layers] == [None, 0.8]


@pytest.mark.parametrize("kind", MODELS)
def test_under_autocast_it_is_the_same_up_to_rounding(kind: str) -> None:
    model = MODELS[kind]().train()
    tuner = changed(model)
    add_noise(tuner, 0.5)
    images, labels = batch(dtype=torch.float32)

    def noisy_gradients() -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(F.cross_entropy(model(images).float(), labels), tuner.parameters()))

    whole = noisy_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        half = noisy_gradients()
    for a, b in zip(half, whole, strict=True):
        assert a.dtype is b.dtype
        assert (a - b).norm() <= 0.25 * b.norm() + 1e-6


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_mean_over_the_noise_is_the_plain_output(kind: str, units: bool) -> None:
    """Of one noisy layer: deeper down the mean passes through what is not linear."""
    model = MODELS[kind]().double().train()
    tuner = changed(model, units)
    name = "blocks.1.mlp.fc2" if kind == "vit" else "pointwise"
    layer: Any = model.get_submodule(name)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].detach(), output.detach()]))
    model(batch()[0])
    add_noise(tuner, 0.5)
    torch.manual_seed(0)
    draws = torch.stack([layer(seen[0]).detach() for _ in range(2000)])
    error = (draws.mean(0) - seen[1]).abs() / (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-12)
    assert draws.std(0).max() > 1e-3
    assert error.mean() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.15)  # of a standard normal


def test_sigma_falls_with_depth() -> None:
    model = small_vit()
    tuner = attach(model, choose(model))
    add_noise(tuner, 0.8)
    swapped: list[Any] = [module for module in model.modules() if isinstance(module, Tuned)]
    sigmas = [module._fewtune.noise.sigma for module in swapped if module._fewtune.noise is not None]
    count = len(tuner.selection.places)
    assert sigmas == pytest.approx([0.8 * (1 - depth / count) for depth in range(count)])


def test_files_know_nothing_of_it() -> None:
    model, fresh = small_vit().train(), small_vit().train()
    tuner = attach(model, choose(model))
    add_noise(tuner, 1.0)
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.01)
    for step in range(3):
        images, labels = batch(step, dtype=torch.float32)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    delta, tuned = tuner.delta(), dict(tuner.plain_state_dict())
    delta.apply(fresh)
    assert same_bits(state_of(fresh), tuned)


@pytest.mark.parametrize(
    "kind", ["weight used by function", "attention, packed", "GRU cell", "transposed conv1d", "StdConv2d"]
)
def test_a_layer_that_it_does_not_know_is_refused(kind: str) -> None:
    net = KINDS[kind].net(torch.float32, 0).train()
    tuner = attach(net, fewtune.select(fewtune.random_importance(net), k=1))

    def noisy() -> None:
        add_noise(tuner, 1.0)
        net(torch.randn(6, *KINDS[kind].shape))

    with pytest.raises(TuningError, match="noise: "):
        noisy()
