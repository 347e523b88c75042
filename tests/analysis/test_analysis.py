"""Analyses of scores and selections: cases whose answers are known by hand or from another library."""

from __future__ import annotations

from math import comb, isnan

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import fewtune
from fewtune.analysis import chosen_by, located, rank_correlation, sharing, sharing_by_layer
from fewtune.errors import ImportanceError, SelectionError
from fewtune.importance import Scores
from fewtune.neurons import Places
from fewtune.selection import Selection, select
from selected import ANATOMY, CONNECTIONS, SHAPES, matrices_of, scores_of


def _scores(function: object, seed: int = 0) -> Scores:
    """Scores of the small net, each matrix changed by a function."""
    return scores_of({name: function(matrix) for name, matrix in matrices_of(scores_of(seed=seed)).items()})  # type: ignore[operator]


def test_correlation_is_scipys_by_network_layer_and_neuron() -> None:
    a, b = scores_of(seed=1), _scores(lambda m: (m * 4).round() + 0.5, seed=2)  # many equal scores
    got = rank_correlation(a, b)
    x, y = matrices_of(a), matrices_of(b)
    everything = [torch.cat([m.flatten() for m in matrices.values()]) for matrices in (x, y)]
    assert got.network == pytest.approx(scipy.stats.spearmanr(*everything).statistic)
    for name in SHAPES:
        assert got.layers[name] == pytest.approx(scipy.stats.spearmanr(x[name].flatten(), y[name].flatten()).statistic)
        rows = [scipy.stats.spearmanr(p, q).statistic for p, q in zip(x[name], y[name], strict=True)]
        assert got.neurons[name] == pytest.approx(np.nanmean(rows))


def test_only_the_order_counts_and_within_neurons_not_their_scale() -> None:
    a = scores_of(seed=1)
    same = rank_correlation(a, _scores(lambda m: m.exp(), seed=1))
    assert same.network == pytest.approx(1)
    assert set(same.layers) == set(SHAPES)
    opposite = rank_correlation(a, _scores(lambda m: 2 - m, seed=1))
    assert opposite.network == pytest.approx(-1)
    scaled = _scores(lambda m: m * 10.0 ** -torch.arange(len(m))[:, None], seed=1)  # each neuron on a scale of its own
    apart = rank_correlation(a, scaled)
    assert all(value == pytest.approx(1) for value in apart.neurons.values())
    assert all(value < 0.9 for value in apart.layers.values())


def test_scores_in_bfloat16_are_compared() -> None:
    a = scores_of({name: m.bfloat16() for name, m in matrices_of(scores_of(seed=1)).items()})
    assert rank_correlation(a, scores_of(seed=1)).network == pytest.approx(1, abs=0.01)


def test_scores_that_do_not_vary_have_no_correlation() -> None:
    flat = rank_correlation(scores_of(), _scores(torch.ones_like))
    assert isnan(flat.network)
    assert isnan(flat.layers["first.weight"])
    with pytest.raises(ImportanceError, match="different models"):
        rank_correlation(scores_of(), fewtune.random_importance(nn.Linear(3, 2), head=None))


def _random(k: int, seed: int) -> Selection:
    return select(scores_of(seed=seed), k=k)


def test_chance_is_what_random_selections_share() -> None:
    pairs = [sharing({"a": _random(2, seed), "b": _random(3, seed + 1000)})[0] for seed in range(400)]
    shared = np.array([pair.shared for pair in pairs])
    assert len({pair.chance for pair in pairs}) == 1
    mean, std = pairs[0].chance, pairs[0].chance_std
    assert mean == pytest.approx(sum(6 * n / f for n, f in SHAPES.values()) / 36)
    assert abs(shared.mean() - mean) < 4 * std / 20
    assert shared.std() == pytest.approx(std, rel=0.15)


def test_variance_is_that_of_the_hypergeometric_distribution() -> None:
    a, b = _random(2, 0), _random(3, 1)
    variance = sum(n * scipy.stats.hypergeom(f, 2, 3).var() for n, f in SHAPES.values())
    assert sharing({"a": a, "b": b})[0].chance_std * 36 == pytest.approx(variance**0.5)


def test_pairs_in_order_and_by_layer() -> None:
    a, b, c = (_random(2, seed) for seed in range(3))
    pairs = sharing({"a": a, "b": b, "c": c})
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    whole = sharing({"a": a, "again": a})[0]
    assert (whole.shared, whole.above_chance) == (1, 1)
    layers = sharing_by_layer(a, b)
    assert list(layers) == list(SHAPES)
    assert sum(layers[n].shared * 2 * SHAPES[n][0] for n in SHAPES) == pytest.approx(36 * pairs[0].shared)
    assert layers["up.weight"].chance == pytest.approx(2 / 4)
    every = select(scores_of(), k=27)
    assert isnan(sharing({"every": every, "a": a})[0].above_chance)


def _places(columns: list[int]) -> Selection:
    """One connection for each neuron of the net's first layer."""
    flat = torch.arange(4) * 6 + torch.tensor(columns)
    return Selection(ANATOMY, {"first.weight": Places(4, 6, flat)}, {})


def test_how_many_selections_chose_a_connection() -> None:
    chosen = {"a": _places([0, 0, 0, 0]), "b": _places([0, 0, 1, 1]), "c": _places([0, 2, 1, 3])}
    # In all three: (0, 0). In two: (1, 0), (2, 1). In one: (1, 2), (2, 0), (3, 0), (3, 1), (3, 3).
    observed, chance = zip(*chosen_by(chosen), strict=True)
    assert observed == pytest.approx([5 / 8, 2 / 8, 1 / 8])
    binomial = [comb(3, m) * (1 / 6) ** m * (5 / 6) ** (3 - m) for m in (1, 2, 3)]
    assert chance == pytest.approx([p / sum(binomial) for p in binomial])
    assert [pair[0] for pair in chosen_by({"a": chosen["a"], "again": chosen["a"]})] == [0, 1]


def test_what_cannot_be_compared() -> None:
    with pytest.raises(SelectionError, match="got 1 selections; expected two or more"):
        chosen_by({"a": _random(1, 0)})
    with pytest.raises(SelectionError, match="the selection none has no connections"):
        sharing({"a": _random(1, 0), "none": Selection(ANATOMY, {}, {})})
    other = select(fewtune.random_importance(nn.Linear(3, 2), head=None), k=1)
    for mix in (sharing, chosen_by):
        with pytest.raises(SelectionError, match="different models"):
            mix({"a": _random(1, 0), "b": _random(2, 0), "c": other})


def test_where_connections_lie() -> None:
    parts = {"bottom": "first*", "convolutions": "[cu]*"}
    by_neuron = located(_random(2, 0), parts)
    assert [part.connections for part in by_neuron.values()] == [8, 22, 6]
    assert list(by_neuron) == ["bottom", "convolutions", "elsewhere"]
    assert all(part.share == pytest.approx(part.share_of_neurons) for part in by_neuron.values())

    def above(name: str, shape: tuple[int, int]) -> Tensor:
        return torch.rand(shape) + (10 if name == "block.1.weight" else 0)

    by_network = located(
        select(scores_of({n: above(n, s) for n, s in SHAPES.items()}), budget=24 / CONNECTIONS, granularity="network"),
        parts,
    )
    assert (by_network["elsewhere"].share, by_network["bottom"].connections) == (1, 0)
    with pytest.raises(SelectionError, match=r"no weight matches 'frist\.weight' of 'bottom' \(did you mean 'first"):
        located(_random(2, 0), {"bottom": "frist.weight"})
    with pytest.raises(SelectionError, match=r"conv\.weight belongs to 'a' and to 'b'"):
        located(_random(2, 0), {"a": "conv*", "b": "c*"})
