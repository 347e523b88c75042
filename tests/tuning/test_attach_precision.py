"""Attached models under autocast, with a gradient scaler, and with backbones of half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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
from fewtune.tuning.ops import cost

HALF = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of a relative difference between two computations in a half precision."""


def dense_gradients(model: nn.Module, selection, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What autograd gives a plain copy at the selected places."""
    reference = copy.deepcopy(model)
    run(reference).backward()
    return {n: reference.get_parameter(n).grad.reshape(-1)[p.flat] for n, p in selection.places.items()}


def assert_gradients_close(ours: dict[str, Tensor], dense: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in ours.items():
        scale = dense[name].abs().max()
        assert scale > 0
        assert (gradient.reshape(-1) - dense[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_autocast(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Output and gradients as without attach, whether the backward pass runs within autocast or after it."""
    model = make().eval()
    selection = choose(model)
    images, labels = batch(dtype=torch.float32)

    def run(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(network(images), labels)

    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        expected = model(images)
    dense = dense_gradients(model, selection, run)
    tuner = attach(model, selection)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(images), expected)
    after = torch.autograd.grad(run(model), tuner.parameters())
    gradients = dict(zip(tuner.named_parameters(), after, strict=True))
    assert all(g.dtype is torch.float32 for g in after)
    assert_gradients_close({n: gradients[n] for n in selection.places}, dense, ROUNDING[dtype])


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), (500, 64)),
    "convolution": (lambda: nn.Conv2d(16, 12, 3), (20, 16, 8, 8)),
}


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_backward_pass_within_autocast_adds_in_float32(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    tuner = attach(layer, choose(layer, head=None))
    gradients = []
    for within in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            gradients.append(torch.autograd.grad(y, tuner.parameters(), dy))
    for outside, inside in zip(*gradients, strict=True):
        assert torch.equal(outside, inside)


def saved_by(run: Callable[[], Tensor]) -> list[Tensor]:
    """Every tensor that a forward pass keeps for its backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_under_autocast_the_frozen_weight_is_kept_by_reference(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    attach(layer, choose(layer, head=None))
    frozen = layer._parameters["weight"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_by(lambda: layer(x))
    weights = [t for t in saved if t.numel() == frozen.numel()]
    assert [t.data_ptr() for t in weights] == [frozen.data_ptr()]
    assert all(t.dtype is torch.bfloat16 for t in saved if t.is_floating_point() and t.data_ptr() != frozen.data_ptr())


def test_only_the_selected_columns_of_an_input_are_kept() -> None:
    layer = nn.Linear(256, 32)
    attach(layer, choose(layer, k=1, head=None))
    hot = layer._fewtune.tuned["weight"].places.hot.numel()
    assert hot <= 32
    columns = cost.filled(1 + hot)  # with the ones that give the bias's gradient
    assert hot < columns <= hot + cost.LANES
    x = torch.randn(10, 256, requires_grad=True)
    saved = saved_by(lambda: layer(x))
    assert sorted(t.numel() for t in saved) == sorted([10 * columns, 32 * 256])


@pytest.mark.parametrize("neurons", [32, 3000])  # the product in one piece, and in blocks of neurons
def test_a_gradient_keeps_no_more_memory_than_its_own(neurons: int) -> None:
    layer = nn.Linear(900, neurons)
    tuner = attach(layer, choose(layer, k=2, head=None))
    layer(torch.randn(10, 900)).sum().backward()
    for values in tuner.parameters():
        assert values.grad.untyped_storage().nbytes() == values.numel() * 4


def test_scaler_steps_and_skips() -> None:
    """float16 with a gradient scaler: a step is taken, one with an overflow is left out and moves nothing."""
    model = small_vit()
    tuner = attach(model, choose(model))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    images, labels = batch(dtype=torch.float32)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(images).float(), labels) * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0, error_if_nonfinite=False)
        scaler.step(optimizer)
        scaler.update()

    before = state_of(model)
    step(1e30)
    assert same_bits(state_of(model), before)
    assert scaler.get_scale() == 2.0**9
    step(1.0)
    for name in tuner.selection.places:
        assert not torch.equal(model.state_dict()[name], before[name])
        assert model.state_dict()[name].isfinite().all()


# ---- half-precision backbones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_half_precision_backbones_have_float32_masters(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = make().eval().to(dtype)
    before = state_of(model)
    selection = choose(model)
    images, labels = batch(dtype=dtype)
    with torch.no_grad():
        expected = model(images)
    dense = dense_gradients(model, selection, lambda m: F.cross_entropy(m(images).float(), labels))
    tuner = attach(model, selection)
    assert all(p.dtype is torch.float32 for p in tuner.parameters())
    assert sum(p.numel() for p in tuner.parameters()) == tuner.trained
    output = model(images)
    assert torch.equal(output, expected)
    F.cross_entropy(output.float(), labels).backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in tuner.parameters())
    gradients = {n: tuner.named_parameters()[n].grad for n in selection.places}
    assert_gradients_close(gradients, {n: g.float() for n, g in dense.items()}, 3 * ROUNDING[dtype])

    optimizer = torch.optim.SGD(tuner.parameters(), lr=1e-6)
    for _ in range(3):
        optimizer.step()
    moved = [n for n, p in tuner.named_parameters().items() if not torch.equal(p.detach(), tuner._trained[n].before)]
    assert "head.weight" in moved, "steps below half precision's resolution add up in the master"
    assert same_bits(state_of_plain(tuner), {n: rounded(tuner, n, t) for n, t in before.items()})
    tuner.detach(keep=False)
    assert same_bits(state_of(model), before)


def state_of_plain(tuner) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tuner.plain_state_dict().items()}


def rounded(tuner, name: str, before: Tensor) -> Tensor:
    """What the model's tensor must hold: the master's values in half precision, everything else as it was."""
    master = tuner.named_parameters().get(name)
    if master is None:
        return before
    values = master.detach().to(before.dtype)
    if name not in tuner.selection.places:
        return values
    whole = before.clone().reshape(-1)
    whole[tuner.selection.places[name].flat] = values.reshape(-1)
    return whole.reshape(before.shape)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.half),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("backbone", [torch.float32, torch.bfloat16])
def test_casting_to_half_precision_after_attach_is_refused(cast: Callable, backbone: torch.dtype) -> None:
    model = small_vit().to(backbone)
    tuner = attach(model, choose(model))
    with pytest.raises(TuningError, match="cast it first, then attach"):
        cast(model)
    assert all(p.dtype is torch.float32 for p in tuner.parameters())


@pytest.fixture(params=[False, True], ids=["by data", "by swapping tensors"])
def _way_of_conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's two ways to convert a model's parameters."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_way_of_conversion")
def test_casting_to_a_wider_precision_keeps_the_trained_values() -> None:
    model = small_vit().to(torch.bfloat16)
    tuner = attach(model, choose(model))
    model(batch(dtype=torch.bfloat16)[0])
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)
    values = {name: p.detach().double() for name, p in tuner.named_parameters().items()}
    model.double()
    for name, places in tuner.selection.places.items():
        assert torch.equal(tuner.named_parameters()[name], values[name])
        assert torch.equal(model.state_dict()[name].reshape(-1)[places.flat], values[name].reshape(-1))
    cross_entropy_step(model, 0)


def test_moving_the_model_moves_what_is_attached_to_it() -> None:
    """The meta device stands for any other: parameters, indices and outputs follow."""
    model = small_convnet()
    attach(model, choose(model))
    model.to("meta")
    for module in model.modules():
        for tensor in module._fewtune.tuned.values() if hasattr(module, "_fewtune") else ():
            assert tensor.index.is_meta
            assert tensor.places.device.type == "meta"
    assert model(torch.randn(2, 3, 16, 16, device="meta")).is_meta
