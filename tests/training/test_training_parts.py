"""The parts of training: learning rate, averaging, loaders, methods."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import fewtune
from fewtune.classification.learner import _class_weights
from fewtune.data import load_data
from fewtune.errors import DataError, ModelError, TuningError
from fewtune.methods.bias import bias
from fewtune.methods.full import Full
from fewtune.methods.linear import Features, fit_probe, head_features, linear, linear_head
from fewtune.models import load_backbone
from fewtune.tasks import prepare
from fewtune.training.ema import Average
from fewtune.training.loaders import image_loader
from fewtune.training.schedule import learning_rate
from fewtune.training.tuners import Share, score
from runs import coloured_folder, tiny_recipe


def test_learning_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, peak=1e-2, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == 1e-7
    assert np.diff(rates[:11]) == pytest.approx((1e-2 - 1e-7) / 10)
    assert rates[10] == 1e-2
    assert max(np.diff(rates[10:])) < 0
    assert rates[10 + 44] == pytest.approx(1e-8 + (1e-2 - 1e-8) * (1 + np.cos(np.pi * 44 / 89)) / 2)
    assert rates[-1] == pytest.approx(1e-8)
    assert learning_rate(0, peak=1e-3, steps=1, warmup=0) == 1e-3
    assert learning_rate(5, peak=1e-9, steps=10, warmup=0) == 1e-9


def test_average_is_the_formula_and_steps_aside_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    synced = []
    trained: Any = SimpleNamespace(parameters=lambda: [parameter], sync=lambda: synced.append(parameter.tolist()))
    average, expected = Average(trained, 0.9), parameter.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            parameter.add_(torch.tensor([0.1, 0.3]))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
        average.update(trained)
    assert torch.allclose(average.values[0], expected)
    own = parameter.detach().clone()
    with average.in_place_of(trained):
        assert torch.equal(parameter, average.values[0])
        assert synced[-1] == parameter.tolist()
    assert torch.equal(parameter, own)
    other = Average(trained, 0.9)
    other.load_state_dict(average.state_dict())
    assert other.steps == 29
    assert torch.equal(other.values[0], average.values[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> fewtune.data.ImageData:
    return load_data(coloured_folder(tmp_path_factory.mktemp("data") / "images", each=8), test_fraction=0.25)


def _noisy(image: Any) -> torch.Tensor:
    """An augmentation that draws from torch, NumPy and Python."""
    return torch.rand(2) + torch.tensor([np.random.rand(), random.random()])


def _batches(loader: Any) -> list[tuple[list[float], list[int]]]:
    return [(x.flatten().tolist(), indices.tolist()) for x, _, indices in loader]


def test_batches_depend_on_seed_epoch_and_image_alone(images: Any) -> None:
    split = images.train.with_transform(_noisy)
    state = torch.get_rng_state()
    first = _batches(image_loader(split, 4, seed=1, epoch=3, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert _batches(image_loader(split, 4, seed=1, epoch=3, shuffle=True)) == first
    assert _batches(image_loader(split, 4, seed=1, epoch=3, shuffle=True, workers=2)) == first
    assert _batches(image_loader(split, 4, seed=1, epoch=4, shuffle=True)) != first
    assert _batches(image_loader(split, 4, seed=2, epoch=3, shuffle=True)) != first


def test_the_shares_of_two_processes_are_the_batches_of_one(images: Any) -> None:
    split = images.train.with_transform(_noisy)
    assert len(split) % 2 == 0
    whole = _batches(image_loader(split, 4, seed=1, shuffle=True))
    shares = [_batches(image_loader(split, 2, seed=1, shuffle=True, world=2, rank=rank)) for rank in (0, 1)]
    for (_, together), (_, one), (_, other) in zip(whole, *shares, strict=True):
        assert sorted(together) == sorted(one + other)


def test_class_weights_give_every_class_the_same_total() -> None:
    labels = [0] * 6 + [1] * 2
    weights = _class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([8 / 18, 8 / 6, 0])
    totals = [float(weights[label]) * labels.count(label) for label in (0, 1)]
    assert totals[0] == pytest.approx(totals[1])


def test_bias_trains_as_many_as_published() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    assert bias(model, ("head",)).trained == 179_812
    assert linear(model, ("head",)).trained == 76_900


def _features(count: int, classes: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    inputs = torch.randn(count, 6, generator=generator) * torch.tensor([1, 2, 3, 4, 5, 100.0]) + 7
    inputs[:, 0] += labels
    return Features(inputs, labels)


@pytest.fixture
def _three_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewtune.methods.linear.REGULARISATION", (1e-3, 1e-1, 1e1))


@pytest.mark.usefixtures("_three_strengths")
@pytest.mark.parametrize("classes", [2, 3])
def test_probe_is_converged(classes: int) -> None:
    """The gradient of the penalised loss, in the standardised features that it is fitted to, vanishes."""
    train = _features(120, classes, 0)
    probe = fit_probe(train, _features(60, classes, 1), classes)
    assert max(probe.accuracies.values()) == probe.accuracies[probe.regularisation]
    mean, scale = train.inputs.mean(0), train.inputs.std(0, correction=0)
    x = ((train.inputs - mean) / scale).double()
    weight = (probe.weight * scale).double().requires_grad_()
    offset = (probe.bias + probe.weight @ mean).double().requires_grad_()
    logits = x @ weight.T + offset
    assert torch.allclose(logits.float(), train.inputs @ probe.weight.T + probe.bias, atol=1e-3)
    loss = nn.functional.cross_entropy(logits, train.labels, reduction="sum")
    # Of two classes scikit-learn fits one row, the difference: |row|^2 / 2 is |weight|^2 for both halves together.
    penalty = weight.square().sum() / probe.regularisation * (1 if classes == 2 else 0.5)
    gradients = torch.autograd.grad(loss + penalty, [weight, offset])
    assert max(float(g.abs().max()) for g in gradients) < 0.02 * 120**0.5


@pytest.mark.usefixtures("_three_strengths")
def test_probe_never_predicts_a_class_without_training_images() -> None:
    train, val = _features(60, 2, 0), _features(30, 2, 1)
    probe = fit_probe(train, val, 3)
    assert not bool(((val.inputs @ probe.weight.T + probe.bias).argmax(1) == 2).any())


def test_probe_sees_what_the_head_is_given() -> None:
    backbone = load_backbone("timm:test_vit", num_classes=3, image_size=32, pretrained=False)
    layer = linear_head(backbone.model, backbone.head)
    x = torch.randn(5, 3, 32, 32)
    got = head_features(backbone.model, layer, [(x, torch.zeros(5))], torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(layer(got.inputs), backbone.model(x))
    with pytest.raises(ModelError, match="one Linear layer"):
        linear_head(backbone.model, ("blocks",))
    with pytest.raises(DataError, match=r"one class an image, got labels \(5, 3\)"):
        head_features(backbone.model, layer, [(x, torch.zeros(5, 3))], torch.device("cpu"))


def test_full_trains_running_statistics_and_its_task_file_carries_them(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return load_backbone("timm:test_resnet", num_classes=3, image_size=32, pretrained=False).model

    model, x = fresh(), torch.randn(8, 3, 32, 32)
    tuner = Full(model, ("fc",), fresh)
    assert tuner.trained == sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.SGD(tuner.param_groups(lr=0.1, head_lr=0.2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    before = tuner.state_dict()["model"]["bn1.running_mean"].clone()
    model.train()
    for _ in range(2):
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(tuner.state_dict()["model"]["bn1.running_mean"], before)
    tuner.delta({"method": "full"}).save(tmp_path / "full.safetensors")
    other = fresh()
    fewtune.load_delta(tmp_path / "full.safetensors").apply(other)
    with torch.no_grad():
        assert torch.equal(other(x), model.eval()(x))
    with pytest.raises(TuningError, match="another model"):
        tuner.load_state_dict({"bn1.running_mean": before})


def test_scores_of_some_images_are_those_of_the_first_batches(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": coloured_folder(tmp_path / "images"), "batch_size": 8, "augment": "plain"}
    run = Share(prepare(tiny_recipe(**settings)), torch.device("cpu"))
    assert len(list(run.scored_batches())) > 2
    first = fewtune.gradient_importance(run.model, run.scored_batches(), run.objective, run.head, limit=2)
    some = score(prepare(tiny_recipe(**settings, scored_images=10)))  # two whole batches
    assert all(torch.equal(some[name], first[name]) for name in first)
    halves = [
        Share(prepare(tiny_recipe(**settings, scored_images=10)), torch.device("cpu"), world=2, rank=rank)
        for rank in range(2)
    ]
    assert [len(list(half.scored_batches())) for half in halves] == [1, 1]
