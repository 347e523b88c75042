"""Scores: the modulus of the summed gradient of every connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune import CrossEntropy, SupCon, gradient_importance
from fewtune.errors import ImportanceError
from fewtune.neurons import Role
from scored import LABELS, WEIGHTS, Batch, Net, assert_close, batches, cross_entropy, dense_sums, images, net


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


def test_scoring_ends_when_the_selection_has_settled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batch = (torch.randn(8, 6), torch.arange(8) % 3)
    seen: list[int] = []

    def scores(settle: float | None, batches: list[Any]) -> fewtune.Scores:
        seen.clear()
        options: dict[str, Any] = {"head": None, "settle": settle, "progress": lambda done, total: seen.append(done)}
        return fewtune.gradient_importance(model, batches, fewtune.CrossEntropy(), **options)

    same = scores(1.0, [batch] * 10)  # the same images over and over: after two batches all agrees
    assert seen == [1, 2]
    assert all(torch.equal(same[name], scores(None, [batch] * 2)[name]) for name in same)
    means, labels = torch.randn(3, 6), torch.arange(8) % 3
    changing = [(means[labels] + 2 * torch.randn(8, 6), labels) for _ in range(10)]
    scores(None, changing)
    assert seen == list(range(1, 11))
    scores(0.6, changing)
    looked, settled_after = {2, 4, 6, 8}, seen[-1]
    assert settled_after in looked

    def agreement(batches: int) -> float:
        more, half = scores(None, changing[:batches]), scores(None, changing[: batches // 2])
        same = [more[name].argmax(1).eq(half[name].argmax(1)) for name in more]
        return float(torch.cat(same).float().mean())

    shares = {batches: agreement(batches) for batches in sorted(looked) if batches <= settled_after}
    assert [batches for batches, share in shares.items() if share >= 0.6] == [settled_after]
    with pytest.raises(ImportanceError, match=r"settle=1\.5; expected a share"):
        scores(1.5, changing)
