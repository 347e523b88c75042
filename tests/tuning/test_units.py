"""Values in units of their input: the same model by another parameter, for every optimiser, and exact in its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call

import fewtune
from attaching import batch, choose, same_bits, small_convnet, small_vit, state_of
from fewtune.errors import TuningError
from fewtune.tasks import fit
from fewtune.tuning import attach, column_rms
from fewtune.tuning.units import FLOOR
from layer_kinds import KINDS, Functional
from runs import coloured_folder, tiny_recipe
from stopping import Stop

MODELS = {"vit": small_vit, "convnet": small_convnet}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
}


def rms_of(model: nn.Module, selection: fewtune.Selection, steps: int = 2) -> dict[str, Tensor]:
    views = {name: selection.anatomy.views[name] for name in selection.places}
    return column_rms(model, [batch(step, dtype=next(model.parameters()).dtype) for step in range(steps)], views)


def attached(kind: str, **options: Any) -> tuple[nn.Module, fewtune.Tuner, dict[str, Tensor]]:
    model = MODELS[kind]().double().eval()
    selection = choose(model, **options)
    rms = rms_of(model, selection)
    return model, attach(model, selection, column_rms=rms), rms


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["neuron", "layer"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_model_with_w0_plus_u_over_rms(kind: str, granularity: str, optimizer: str) -> None:
    """Beside an obvious reference: a whole U with a 0/1 mask, of which autograd makes the weights in every step."""
    reference = MODELS[kind]().double().eval()
    model, tuner, rms = attached(kind, granularity=granularity)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    selection = tuner.selection
    scales, whole = {}, [*selection.whole, *selection.head]
    for name, places in selection.places.items():
        view, column = selection.anatomy.views[name], rms[name].clamp(min=FLOOR * rms[name].square().mean().sqrt())
        matrix = (1 / column).double().repeat_interleave(view.neurons // len(column), dim=0)
        scales[name] = view.stored(matrix * places.mask())
    u = {name: torch.zeros_like(before[name], requires_grad=True) for name in scales}
    others = {name: before[name].clone().requires_grad_() for name in whole}
    theirs = OPTIMIZERS[optimizer]([*u.values(), *others.values()])
    for step in range(3):
        images, labels = batch(step)
        weights = {name: before[name] + u[name] * scales[name] for name in u}
        theirs.zero_grad()
        F.cross_entropy(functional_call(reference, {**before, **weights, **others}, (images,)), labels).backward()
        theirs.step()
    train(model, OPTIMIZERS[optimizer](tuner.parameters()))
    plain = tuner.plain_state_dict()
    for name in (*u, *others):
        expected = before[name] + u[name] * scales[name] if name in u else others[name]
        assert not torch.equal(plain[name], before[name])
        torch.testing.assert_close(plain[name], expected.detach(), rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_adams_first_step_moves_all_outputs_alike(kind: str) -> None:
    """|dw| rms(x_j) is the learning rate at every connection, wherever its column lies."""
    model, tuner, rms = attached(kind)
    before = {name: tensor.clone() for name, tensor in tuner.plain_state_dict().items()}
    train(model, torch.optim.Adam(tuner.parameters(), lr=0.01, eps=0), steps=1)
    for name, places in tuner.selection.places.items():
        view, after = tuner.selection.anatomy.views[name], tuner.plain_state_dict()[name]
        matrix = rms[name].clamp(min=FLOOR * rms[name].square().mean().sqrt()).double()
        moved = view.matrix((after - before[name]).abs()) * matrix.repeat_interleave(view.neurons // len(matrix), dim=0)
        moved = moved.reshape(-1)[places.flat]
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 0.01), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_files_know_nothing_of_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What is written are weights: a delta of them applies and reverts bit for bit."""
    model = MODELS[kind]().to(dtype).eval()
    fresh, selection = copy.deepcopy(model), choose(model)
    tuner = attach(model, selection, column_rms=rms_of(model, selection))
    assert same_bits(dict(tuner.plain_state_dict()), state_of(fresh))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.02)
    for step in range(2):
        images, labels = batch(step, dtype=dtype)
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
    tuner.delta().save(tmp_path / "delta.safetensors")
    tuned = {name: tensor.clone() for name, tensor in tuner.plain_state_dict().items()}
    untouched = state_of(fresh)
    delta = fewtune.load_delta(tmp_path / "delta.safetensors")
    delta.apply(fresh)
    assert same_bits(state_of(fresh), tuned)
    delta.revert(fresh)
    assert same_bits(state_of(fresh), untouched)
    tuner.detach(keep=False)
    assert same_bits(state_of(model), untouched)


def test_a_state_brings_its_units_along() -> None:
    model, tuner, rms = attached("vit")
    train(model, torch.optim.Adam(tuner.parameters(), lr=0.01))
    state, tuned = tuner.state_dict(), {n: t.clone() for n, t in tuner.plain_state_dict().items()}
    other = small_vit().double().eval()
    again = attach(other, choose(other), column_rms={name: 2 * value + 1 for name, value in rms.items()})
    again.load_state_dict(state)
    assert same_bits(dict(again.plain_state_dict()), tuned)
    tuner.detach(keep=False)
    with pytest.raises(TuningError, match="other units"):
        attach(model, choose(model)).load_state_dict(state)


def test_a_plain_state_is_read_into_the_values() -> None:
    model, tuner, _ = attached("vit")
    train(model, torch.optim.Adam(tuner.parameters(), lr=0.01))
    tuned = {n: t.clone() for n, t in tuner.plain_state_dict().items()}
    other, _, _ = attached("vit")
    other.load_state_dict(tuned)
    for name, tensor in other.state_dict().items():
        if name in tuned:
            torch.testing.assert_close(tensor, tuned[name], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(6, 9, (3, 2), padding="same", groups=3),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(6, 4, 3, padding=2),
        nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
        Conv2dSame(6, 6, 11, stride=2, groups=6),
    ],
    ids=str,
)
def test_the_rms_is_that_of_the_unfolded_input(layer: nn.Module) -> None:
    """Reference: the layer's own output with one weight 1 and all others 0 is that column."""
    shape = {nn.Linear: (7, 6), nn.Conv1d: (3, 6, 9)}.get(type(layer), (3, 6, 9, 8))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(
        [1, 6] + [1] * (len(shape) - 2)
    )
    model = nn.Sequential(layer)
    selection = fewtune.select(fewtune.random_importance(model, head=None), k=1)
    view = selection.anatomy.views["0.weight"]
    found = column_rms(model, [(x[:2], None), (x[2:], None)], {"0.weight": view})["0.weight"]
    groups = getattr(layer, "groups", 1)
    probe = copy.deepcopy(layer)
    nn.init.zeros_(probe.bias)
    expected = torch.empty(groups, view.fan_in)
    for group in range(groups):
        for column in range(view.fan_in):
            matrix = torch.zeros(view.neurons, view.fan_in)
            neuron = group * view.neurons // groups
            matrix[neuron, column] = 1
            probe.weight.data = view.stored(matrix)
            y = probe(x)
            expected[group, column] = (y[..., neuron] if isinstance(layer, nn.Linear) else y[:, neuron]).square().mean()
    torch.testing.assert_close(found.float(), expected.detach().sqrt())


def test_a_weight_that_no_layer_uses_is_seen_at_its_call() -> None:
    net = Functional()
    selection = fewtune.select(fewtune.random_importance(net, head=None), k=1)
    x = torch.randn(6, 3, 6, generator=torch.Generator().manual_seed(0))
    found = column_rms(net, [(x, None)], {name: selection.anatomy.views[name] for name in selection.places})
    torch.testing.assert_close(found["qkv.weight"].float(), x.square().mean((0, 1)).sqrt()[None])


@pytest.mark.parametrize("kind", ["attention, packed", "GRU cell", "bilinear", "weight norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_an_input_that_is_not_known_is_refused(kind: str) -> None:
    net = KINDS[kind].net(torch.float32, 0)
    selection = fewtune.select(fewtune.random_importance(net), k=1)
    images = torch.randn(6, *KINDS[kind].shape)
    views = {name: selection.anatomy.views[name] for name in selection.places}
    with pytest.raises(TuningError, match="what its columns are given is not known"):
        column_rms(net, [(images, torch.zeros(6))], views)
    with pytest.raises(TuningError, match="column_rms has no"):
        attach(net, selection, column_rms={})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def test_a_run_goes_on_to_the_bit(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, units="input", ema=0.9, lr=5e-3, augment="fgvc")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "parts", callbacks=[Stop(2)])
    whole, parts = fit(recipe, tmp_path / "whole"), fit(recipe, tmp_path / "parts", resume=True)
    one, other = (fewtune.load_delta(run.folder.delta).values for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = fit(recipe.changed(units="weight"), tmp_path / "plain")
    values = fewtune.load_delta(plain.folder.delta).values
    assert any(not torch.equal(value, one[name]) for name, value in values.items())
