"""The paper's variants of the selection, each as a recipe says it: granularity, criterion, K, location."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewtune
from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.importance import Scores
from fewtune.methods.gps import choose
from fewtune.selection import Selection
from fewtune.tasks import evaluate, fit, prepare
from fewtune.training.tuners import score
from fewtune.training.work import Work
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def work(images: Path) -> Work:
    return prepare(tiny_recipe(images))


@pytest.fixture(scope="module")
def gradient(work: Work) -> Scores:
    return score(work)


def _scores(work: Work, **changes: Any) -> Scores:
    return score(replace(work, recipe=_changed(work, **changes)))


def _changed(work: Work, **changes: Any) -> Recipe:
    return work.recipe.changed(**changes)


def _matrices(scores: Scores) -> dict[str, Tensor]:
    return {name: scores.anatomy.views[name].matrix(score) for name, score in scores.items()}


def _counts(selection: Selection) -> dict[str, Tensor]:
    """Connections of every neuron."""
    return {n: p.mask().sum(1) for n, p in selection.places.items()}


def _least_in_and_most_out(selection: Selection, matrices: dict[str, Tensor]) -> tuple[float, float]:
    inside = torch.cat([matrices[n][p.mask()] for n, p in selection.places.items()])
    empty = {n: torch.zeros_like(m, dtype=torch.bool) for n, m in matrices.items()}
    masks = {n: selection.places[n].mask() if n in selection.places else empty[n] for n in matrices}
    return float(inside.min()), max(float(m[~masks[n]].max()) for n, m in matrices.items())


def test_granularities_choose_equally_many_the_largest_of_each_neuron_layer_or_network(
    work: Work, gradient: Scores
) -> None:
    matrices = _matrices(gradient)
    neurons = {name: len(m) for name, m in matrices.items()}
    chosen = {g: choose(_changed(work, k=2, granularity=g), gradient) for g in ("neuron", "layer", "network")}
    assert {selection.connections for selection in chosen.values()} == {2 * sum(neurons.values())}
    assert all(bool((count == 2).all()) for count in _counts(chosen["neuron"]).values())
    assert chosen["layer"].per_layer() == {name: 2 * n for name, n in neurons.items()}
    assert any(bool((count != 2).any()) for count in _counts(chosen["layer"]).values())
    assert chosen["network"].per_layer() != chosen["layer"].per_layer()
    least, most = _least_in_and_most_out(chosen["network"], matrices)
    assert least >= most
    for name, places in chosen["layer"].places.items():
        mask = places.mask()
        assert float(matrices[name][mask].min()) >= float(matrices[name][~mask].max())


@pytest.mark.parametrize("importance", ["gradient", "random", "wanda"])
def test_by_column_all_neurons_of_a_layer_train_the_same_inputs(work: Work, images: Path, importance: str) -> None:
    recipe = _changed(work, k=2, importance=importance, granularity="columns")
    selection = choose(recipe, _scores(work, importance=importance))
    by_neuron = choose(_changed(work, k=2, importance=importance), _scores(work, importance=importance))
    assert selection.connections == by_neuron.connections
    for places in selection.places.values():
        assert len(places.columns.unique()) == 2


def test_a_run_by_column_is_an_exact_small_file(images: Path, tmp_path: Path) -> None:
    shared = fit(tiny_recipe(images, k=4, granularity="columns", lr=1e-2), tmp_path / "columns")
    plain = fit(tiny_recipe(images, k=4, lr=1e-2), tmp_path / "neurons")
    assert shared.metrics["trained"] == plain.metrics["trained"]
    assert shared.metrics["delta_bytes"] < plain.metrics["delta_bytes"]
    assert evaluate(shared.folder.delta, images).to_json()["accuracy"] == shared.metrics["test"]["accuracy"]


@pytest.mark.parametrize("how", [{"k": 1.5}, {"k": None, "budget": 0.1}])
def test_by_column_a_recipe_needs_a_whole_k(work: Work, how: Any) -> None:
    with pytest.raises(ConfigError, match="a whole k, and no budget"):
        _changed(work, granularity="columns", **how)


@pytest.mark.parametrize("name", ["correlation", "snr", "wanda"])
def test_criteria_that_look_at_images(work: Work, gradient: Scores, name: str) -> None:
    from fewtune.data.transforms import two_views
    from fewtune.training.loaders import image_loader

    of = {
        "correlation": fewtune.correlation_importance,
        "snr": fewtune.snr_importance,
        "wanda": fewtune.wanda_importance,
    }
    train = work.data.train
    shown = work.evaluated(train) if name == "wanda" else train.with_transform(two_views(work.backbone))
    batches = [(x, y) for x, y, _ in image_loader(shown, 8, seed=0, shuffle=name != "wanda")]
    expected = of[name](work.backbone.model, batches, head=work.backbone.head)
    scores = _scores(work, importance=name, exclude=["blocks.0"])
    assert set(expected) - set(scores) == {n for n in expected if n.startswith("blocks.0.")}
    for weight, value in scores.items():
        assert torch.allclose(value, expected[weight], rtol=1e-4, atol=1e-6)
    recipe = _changed(work, importance=name, k=1)
    assert choose(recipe, expected).overlap(choose(recipe, gradient)).shared < 0.95


def test_head_ce_is_the_gradient_of_cross_entropy_through_the_fresh_head(work: Work, gradient: Scores) -> None:
    got = _scores(work, objective="cross_entropy")
    model, seen = work.backbone.model, []

    def spy(model: torch.nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        views = torch.cat(inputs)
        seen.append((views, labels.repeat(2)))
        return torch.nn.functional.cross_entropy(model(views), labels.repeat(2))

    from fewtune.data.transforms import two_views
    from fewtune.training.loaders import image_loader

    loader = image_loader(work.data.train.with_transform(two_views(work.backbone)), 8, seed=0, shuffle=True)
    expected = fewtune.gradient_importance(model, [(x, y) for x, y, _ in loader], spy, work.backbone.head)
    assert len(seen) == len(loader)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=1e-7)
        assert not torch.allclose(got[name] / got[name].max(), gradient[name] / gradient[name].max(), atol=1e-2)


def test_magnitude_takes_the_largest_weights_of_every_neuron(work: Work) -> None:
    selection = choose(_changed(work, k=3, importance="magnitude"), _scores(work, importance="magnitude"))
    for name, places in selection.places.items():
        weight = work.backbone.model.get_parameter(name).detach().abs().reshape(places.neurons, places.fan_in)
        inside = weight[places.mask()].view(-1, 3)
        assert torch.equal(inside.sort(1).values, weight.topk(3).values.sort(1).values)


def test_neuron_random_spreads_evenly_and_net_random_does_not(work: Work) -> None:
    def at_random(granularity: str, seed: int = 0) -> Selection:
        recipe = _changed(work, importance="random", granularity=granularity, seed=seed)
        return choose(recipe, _scores(work, importance="random", seed=seed))

    by_neuron, by_network = at_random("neuron"), at_random("network")
    assert by_neuron.connections == by_network.connections
    assert all(bool((count == 1).all()) for count in _counts(by_neuron).values())
    # Over the whole network a layer's share is its share of connections, not of neurons.
    views, counts = by_network.anatomy.views, by_network.per_layer()
    for name, view in views.items():
        share = view.neurons * view.fan_in / by_network.anatomy.connections
        assert counts[name] / by_network.connections == pytest.approx(share, rel=0.35)
    assert any(bool((count == 0).any()) for count in _counts(by_network).values())
    assert at_random("neuron") == by_neuron
    assert at_random("neuron", seed=1).overlap(by_neuron).shared < 0.2


def test_k_from_1_to_20_is_nested(work: Work, gradient: Scores) -> None:
    before, fan_ins = None, {n: m.shape for n, m in _matrices(gradient).items()}
    for k in (1, 2, 5, 10, 15, 20):
        selection = choose(_changed(work, k=k), gradient)
        assert selection.per_layer() == {n: neurons * min(k, fan_in) for n, (neurons, fan_in) in fan_ins.items()}
        assert before is None or (before & selection) == before
        before = selection


@pytest.mark.parametrize(
    ("patterns", "blocks"), [(["blocks.3"], {3}), (["blocks.0", "blocks.1", "blocks.2"], {0, 1, 2})]
)
def test_blocks_are_left_out_one_by_one_or_the_first(
    work: Work, gradient: Scores, patterns: list[str], blocks: set[int]
) -> None:
    everything = choose(work.recipe, gradient)
    left = choose(_changed(work, exclude=patterns), gradient)
    out = [n for n in everything.per_layer() if any(n.startswith(f"blocks.{b}.") for b in blocks)]
    assert len(out) == 4 * len(blocks)
    kept = {n: p for n, p in everything.places.items() if n not in out}
    assert left.places == kept
    assert not [n for n in left.whole if any(n.startswith(f"blocks.{b}.") for b in blocks)]


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "layer", "k": 0.5, "objective": "cross_entropy"},
        {"granularity": "network", "importance": "random"},
        {"k": 20, "importance": "magnitude", "exclude": ["blocks.0", "blocks.1"]},
    ],
    ids=["layer, Head+CE", "Net Random", "magnitude, first blocks left out"],
)
def test_a_variant_is_trained_saved_and_loaded(images: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    result = fit(tiny_recipe(images, epochs=1, **settings), tmp_path / "run")
    got = evaluate(result.folder.delta, str(images), test_fraction=0.25)
    assert got.report.to_json() == result.metrics["test"]
    delta = fewtune.load_delta(result.folder.delta)
    assert delta.selection() == Selection.load(result.folder.selection)
