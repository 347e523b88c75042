"""Scores: the modulus of the summed gradient, and a model that is left as it was found."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune import CrossEntropy, SupCon, gradient_importance
from fewtune.errors import ImportanceError, ModelError
from fewtune.importance import Scores, pooled_features
from fewtune.neurons import Role, describe

Batch = tuple[Any, Tensor]


class Net(nn.Module):
    """A convolution, batch normalisation, dropout and a linear layer; says what its head is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.drop(F.gelu(self.norm(self.conv(x))).mean((2, 3)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.linear(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def images(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [(images(seed, dtype), LABELS) for seed in range(count)]


WEIGHTS = ("conv.weight", "linear.weight")


def dense_sums(
    model: nn.Module, data: list[Batch], loss: Callable[[nn.Module, Any, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Batch by batch, by autograd, with the sign; then the modulus."""
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in WEIGHTS}
    for inputs, labels in data:
        grads = torch.autograd.grad(loss(model, inputs, labels), [model.get_parameter(name) for name in WEIGHTS])
        for name, grad in zip(WEIGHTS, grads, strict=True):
            sums[name] += grad
    return {name: total.abs() for name, total in sums.items()}


def cross_entropy(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def assert_close(scores: Scores, expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(scores) == list(expected)
    for name, value in expected.items():
        assert scores[name].shape == value.shape
        assert float((scores[name] - value).abs().max() / value.max()) < tolerance


def test_scores_are_the_modulus_of_the_summed_gradients() -> None:
    model, data = net(), batches()
    assert_close(gradient_importance(model, data, CrossEntropy()), dense_sums(model, data, cross_entropy))
    of_moduli = [dense_sums(model, [batch], cross_entropy) for batch in data]
    summed_late = {name: sum(part[name] for part in of_moduli) for name in WEIGHTS}
    scores = gradient_importance(model, data, CrossEntropy())
    assert not torch.allclose(scores["conv.weight"], summed_late["conv.weight"])  # type: ignore[arg-type]


def test_the_objective_left_out_is_the_contrastive_one() -> None:
    model, data = net(), batches()

    def contrastive(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        return fewtune.losses.supervised_contrastive_loss(features, labels)

    assert_close(gradient_importance(model, data), dense_sums(model, data, contrastive))


def test_two_views_are_one_batch() -> None:
    model = net()
    views = [((images(0), images(1)), LABELS)]
    joint = [(torch.cat([images(0), images(1)]), LABELS.repeat(2))]
    for objective in (SupCon(0.3), CrossEntropy()):
        ours, theirs = (gradient_importance(model, data, objective) for data in (views, joint))
        assert_close(ours, dict(theirs))


def test_temperature_and_label_smoothing_are_used() -> None:
    model, data = net(), batches(1)

    def smoothed(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), labels, label_smoothing=0.2)

    assert_close(gradient_importance(model, data, CrossEntropy(0.2)), dense_sums(model, data, smoothed))
    scores = [gradient_importance(model, data, SupCon(t, t))["conv.weight"] for t in (0.07, 0.5)]
    assert not torch.allclose(scores[0] / scores[0].max(), scores[1] / scores[1].max())


def test_own_features_and_any_callable() -> None:
    model, data = net(), batches()
    features = SupCon(features=lambda model, x: model.forward_features(x).flatten(1))
    with pytest.raises(ImportanceError, match=r"all scores are zero in linear\.weight"):
        gradient_importance(model, data, features)  # linear comes after these features
    scores = gradient_importance(model, data, features, roles={"linear.weight": "other"})
    assert list(scores) == ["conv.weight"]
    squares = gradient_importance(model, data, lambda model, x, y: model(x).square().sum())
    assert_close(squares, dense_sums(model, data, lambda model, x, y: model(x).square().sum()))


def test_train_mode_uses_batch_statistics_and_keeps_none() -> None:
    model, data = net(), batches()
    model.drop.p = 0.0
    before = copy.deepcopy(model.state_dict())
    scores = gradient_importance(model, data, CrossEntropy(), train_mode=True)
    assert_same(model.state_dict(), before)
    assert_close(scores, dense_sums(copy.deepcopy(model).train(), data, cross_entropy))


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_limit_and_progress(limit: int) -> None:
    model, data = net(), batches()
    calls: list[tuple[int, int | None]] = []
    scores = gradient_importance(model, data, limit=limit, progress=lambda done, total: calls.append((done, total)))
    used = min(limit, 3)
    assert_close(scores, dict(gradient_importance(model, data[:used])))
    assert calls == [(done, used) for done in range(1, used + 1)]


def test_a_loader_without_a_length() -> None:
    model, calls = net(), []

    def stream() -> Iterator[Batch]:
        yield from batches()

    scores = gradient_importance(model, stream(), progress=lambda done, total: calls.append((done, total)))
    assert_close(scores, dict(gradient_importance(model, batches())))
    assert calls == [(1, None), (2, None), (3, None)]


def test_a_limit_reads_no_batch_more() -> None:
    read = []

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            read.append(number)
            yield batch

    gradient_importance(net(), stream(), limit=2)
    assert read == [0, 1]


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_several_passes_give_the_same(passes: int) -> None:
    model, data = net(), batches()
    once = gradient_importance(model, data)
    assert_close(gradient_importance(model, data, passes=passes), dict(once))


def test_sums_may_live_elsewhere() -> None:
    model, data = net(torch.float32), batches(dtype=torch.float32)
    scores = gradient_importance(model, data, store="cpu")
    assert all(score.device.type == "cpu" for score in scores.values())
    assert_close(scores, dict(gradient_importance(model, data)))


def test_one_gradient_is_alive_at_a_time() -> None:
    model, data = net(), batches()
    seen: list[set[str]] = []

    def watched(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        def look(_: Tensor) -> None:
            seen.append({name for name, p in model.named_parameters() if p.grad is not None})

        output = model(inputs)
        output.register_hook(look)
        return F.cross_entropy(output, labels)

    gradient_importance(model, data, watched)
    assert seen == [set()] * 3
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = [(x, torch.tensor([0, 1, 0, 1]))] + [(x * 2**-9, torch.tensor([0, 1, 0, 1]))] * 40
    scores = gradient_importance(model, data, lambda m, x, y: m(x).float().sum(), head="1")
    grads = []
    for x, _ in data:
        (grad,) = torch.autograd.grad(model(x).float().sum(), model[0].weight)
        grads.append(grad)
    assert scores["0.weight"].dtype == torch.float32
    exact = torch.stack(grads).double().sum(0).abs()
    assert torch.allclose(scores["0.weight"].double(), exact, rtol=1e-5)
    rounded = torch.zeros_like(grads[0])
    for grad in grads:
        rounded += grad
    assert not torch.allclose(rounded.abs().double(), exact, rtol=1e-5)


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in state.items())


def found(model: nn.Module) -> list[Any]:
    """All that importance must not change, but for the state dict."""
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        torch.is_grad_enabled(),
    ]


def alike(first: Any, second: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, (Tensor, np.ndarray)):
        return bool((torch.as_tensor(first) == torch.as_tensor(second)).all())
    return bool(first == second)


def restless(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Uses up random numbers of all kinds."""
    random.random()
    np.random.rand()
    torch.rand(1)
    return F.cross_entropy(model(inputs), labels)


def failing(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    restless(model, inputs, labels).backward()
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("objective", [restless, failing])
def test_the_model_is_left_as_found(train_mode: bool, objective: Callable[..., Tensor]) -> None:
    model = net()
    model.train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before, state = found(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        inside = found(model)
        try:
            gradient_importance(model, batches(), objective, train_mode=train_mode)
        except RuntimeError as error:
            assert objective is failing, error  # noqa: PT017
        assert alike(found(model), inside)
    assert alike(found(model), before)
    assert_same(model.state_dict(), state)


class Counting(nn.Module):
    """Counts its calls in a buffer, which it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


def test_a_buffer_that_is_replaced_is_put_back() -> None:
    model = Counting()
    calls = model.calls
    gradient_importance(model, [(torch.randn(4, 4), LABELS[:4])], head=None)
    assert model.calls is calls
    assert float(calls) == 0


def test_nothing_is_left_behind_after_success() -> None:
    model = net()
    gradient_importance(model, batches())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_nan_names_the_weights() -> None:
    data = batches()
    data[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ImportanceError, match=r"scores are not finite in conv\.weight, linear\.weight; look for NaN"):
        gradient_importance(net(), data)


def test_all_zero_names_the_weights() -> None:
    apart = [(images(0), torch.arange(6))]
    with pytest.raises(ImportanceError, match=r"all scores are zero in conv\.weight, linear\.weight: .* two views"):
        gradient_importance(net(), apart)


def test_many_broken_weights_are_counted() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    anatomy = describe(model, head=None)
    with pytest.raises(ImportanceError, match=r"0\.weight, 1\.weight, 2\.weight, 3\.weight, 4\.weight and 3 more"):
        Scores({name: torch.zeros(2, 2) for name in anatomy.views}, anatomy)


def test_negative_scores_are_refused() -> None:
    anatomy = describe(nn.Linear(2, 2), head=None)
    with pytest.raises(ImportanceError, match=r"scores are negative in weight; expected a modulus"):
        Scores({"weight": torch.tensor([[1.0, -1.0], [0.0, 2.0]])}, anatomy)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader yielded no batch"),
        ([torch.zeros(2, 3, 6, 6)], r"the loader yielded Tensor; expected \(images, labels\)"),
        ([(torch.zeros(2, 3, 6, 6), [0, 1])], "the loader yielded tuple"),
        ([(torch.zeros(1), torch.zeros(1), torch.zeros(1))], "the loader yielded tuple"),
        ([{"image": 1, "label": 2}], "the loader yielded dict"),
    ],
)
def test_loaders_that_yield_something_else(loader: Any, message: str) -> None:
    with pytest.raises(ImportanceError, match=message):
        gradient_importance(net(), loader)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, x, y: model(x).sum(1), "expected a scalar tensor"),
        (lambda model, x, y: 1.0, "the objective gave 1.0; expected a scalar tensor"),
        (lambda model, x, y: x.sum(), "does not depend on the model's weights"),
    ],
)
def test_objectives_that_are_none(objective: Any, message: str) -> None:
    with pytest.raises(ImportanceError, match=message):
        gradient_importance(net(), batches(), objective)


@pytest.mark.parametrize("option", [{"limit": 0}, {"limit": -1}, {"passes": 0}])
def test_numbers_that_are_none(option: dict[str, int]) -> None:
    (name,) = option
    with pytest.raises(ImportanceError, match=f"{name}=.*expected a whole number above 0"):
        gradient_importance(net(), batches(), **option)  # type: ignore[arg-type]


def test_a_model_of_a_head_alone() -> None:
    with pytest.raises(ImportanceError, match="no weight to select from outside its head"):
        gradient_importance(nn.Sequential(nn.Linear(3, 2)), batches(), head="0")
    with pytest.raises(ModelError, match="the model has no module 'haed'; the nearest is 'head'"):
        gradient_importance(net(), batches(), head="haed")


class Plain(nn.Module):
    """No interface of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(x)))


def test_features_are_what_the_head_is_given() -> None:
    model, x = Plain(), torch.randn(5, 4)
    assert torch.equal(pooled_features(model, x, "last"), torch.tanh(model.body(x)))
    assert torch.equal(pooled_features(model, x, None), model(x))
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten())
    features = pooled_features(convolutional, torch.randn(2, 3, 5, 5), "2")
    assert features.shape == (2, 4)


def test_features_of_transformers() -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    configuration = ViTConfig(image_size=8, patch_size=4, **sizes)
    x = torch.randn(2, 3, 8, 8)
    classifier = ViTForImageClassification(configuration).eval()
    assert torch.allclose(pooled_features(classifier, x), classifier.vit(x).last_hidden_state[:, 0])
    base = ViTModel(configuration).eval()
    assert torch.equal(pooled_features(base, x), base(x).pooler_output)


def test_features_that_are_none() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ImportanceError, match=r"Conv2d gave pooled features \(2, 4, 3, 3\); expected \[batch, width\]"):
        pooled_features(model, torch.zeros(2, 3, 5, 5), None)


def test_magnitude() -> None:
    model = net()
    scores = fewtune.magnitude_importance(model)
    assert list(scores) == list(WEIGHTS)
    assert all(torch.equal(scores[name], model.get_parameter(name).abs()) for name in WEIGHTS)
    assert not any(score.requires_grad for score in scores.values())


def test_random() -> None:
    model = net()
    state = torch.get_rng_state()
    first, again, other = (fewtune.random_importance(model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in WEIGHTS)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    assert all(bool(((score >= 0) & (score < 1)).all()) for score in first.values())
    on_meta = fewtune.random_importance(Net().to("meta"))
    assert torch.equal(on_meta["conv.weight"], first["conv.weight"])


def test_scores_carry_the_roles() -> None:
    scores = gradient_importance(net(), batches(), roles={"norm.*": "scale"})
    assert len(scores) == 2
    assert "conv.weight" in scores
    assert scores.anatomy.named(Role.SCALE) == ("norm.weight", "norm.bias")
    assert scores.anatomy.named(Role.HEAD) == ("head.weight", "head.bias")
    assert fewtune.select(scores, k=1).whole == ("conv.bias", "linear.bias", "norm.weight", "norm.bias")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (Tied, "first.weight"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrizations.weight.original1"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "weight_v"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrizations.weight.original"),
    ],
)
def test_scores_of_shared_and_parametrised_weights(build: Callable[[], nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x) ** 3).sum()

    scores = gradient_importance(model, [(x, torch.zeros(5))], loss, head=None)
    (expected,) = torch.autograd.grad(loss(model, x, x), model.get_parameter(name))
    assert list(scores) == [name]
    assert torch.allclose(scores[name], expected.abs(), rtol=1e-12)


def _one_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    scores = gradient_importance(net(), batches(4)[rank::world], CrossEntropy())
    torch.save(dict(scores), f"{folder}/scores-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_same_sums(tmp_path: Path) -> None:
    mp.spawn(_one_process, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"scores-{rank}.pt", weights_only=True) for rank in (0, 1))
    together = gradient_importance(net(), batches(4), CrossEntropy())
    assert_close(together, first)
    assert all(torch.equal(first[name], second[name]) for name in WEIGHTS)
