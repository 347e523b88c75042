"""Select: the largest scores by neuron, by layer, over the network or by column."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fewtune
from fewtune.errors import SelectionError
from fewtune.neurons import Places, Role, View, describe
from fewtune.selection import Selection, select
from fewtune.topk import top_mask
from selected import CONNECTIONS, SHAPES, counts_of, matrices_of, scores_of

few_values = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@given(st.integers(1, 4), few_values, st.integers(0, 8))
def test_top_mask_is_a_stable_sort(rows: int, values: list[int], count: int) -> None:
    scores = torch.tensor([values[r:] + values[:r] for r in range(rows)], dtype=torch.float32)
    mask = top_mask(scores, count)
    for row, chosen in zip(scores.tolist(), mask.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        assert [column for column in range(len(row)) if chosen[column]] == sorted(order[:count])


@given(st.integers(0, 20), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_by_neuron_every_neuron_has_its_largest_k(seed: int, k: int) -> None:
    scores = scores_of(seed=seed)
    selection = select(scores, k=k)
    for name, matrix in matrices_of(scores).items():
        fan_in = matrix.shape[1]
        assert counts_of(selection, name) == [min(k, fan_in)] * matrix.shape[0]
        mask = selection.places[name].mask()
        if k < fan_in:
            assert bool((matrix.where(mask, 1.0).amin(1) >= matrix.where(~mask, 0.0).amax(1)).all())


@given(st.integers(0, 20), st.integers(1, 27), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_a_fractional_k_gives_one_more_to_the_largest_remaining(seed: int, whole: int, part: float) -> None:
    scores = scores_of(seed=seed)
    k = whole + part
    selection = select(scores, k=k)
    matrices, base = matrices_of(scores), select(scores, k=whole)
    assert selection.connections == round(sum(m.shape[0] * min(k, m.shape[1]) for m in matrices.values()))
    gained, missed = [], []
    for name, matrix in matrices.items():
        before, after = base.places[name].mask(), selection.places[name].mask()
        assert not (before & ~after).any()
        more = (after & ~before).sum(1)
        assert int(more.max()) <= 1
        if matrix.shape[1] > whole:
            best = matrix.masked_fill(before, -1).amax(1)
            assert torch.equal(best[more == 1], matrix[after & ~before])
            gained += best[more == 1].tolist()
            missed += best[more == 0].tolist()
    assert not gained or not missed or min(gained) >= max(missed)


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
@given(budget=st.floats(0.11, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_budget_is_met_to_the_connection(granularity: Any, budget: float) -> None:
    selection = select(scores_of(), budget=budget, granularity=granularity)
    wanted = round(budget * CONNECTIONS)
    rounding = len(SHAPES) / 2 if granularity == "layer" else 0  # every layer's number is rounded
    assert abs(selection.connections - wanted) <= rounding
    assert selection.fraction == selection.connections / CONNECTIONS


@given(st.integers(0, 20), st.floats(0.2, 9.0))
@settings(max_examples=30, deadline=None)
def test_layer_and_network_keep_as_many_as_k_per_neuron_would(seed: int, k: float) -> None:
    scores = scores_of(seed=seed)
    matrices = matrices_of(scores)
    by_layer = select(scores, k=k, granularity="layer")
    of_neurons = {name: m.shape[0] * min(k, m.shape[1]) for name, m in matrices.items()}
    assert by_layer.per_layer() == {name: round(number) for name, number in of_neurons.items()}
    for name, places in by_layer.places.items():
        mask, matrix = places.mask(), matrices[name]
        assert mask.all() or matrix[mask].min() >= matrix[~mask].max()

    by_network = select(scores, k=k, granularity="network")
    assert by_network.connections == round(sum(of_neurons.values()))
    every = torch.cat([m.reshape(-1) for m in matrices.values()])
    chosen = torch.cat([m[by_network.places[n].mask()] for n, m in matrices.items() if n in by_network.places])
    assert torch.equal(chosen.sort().values, every.sort().values[-len(chosen) :])


@pytest.mark.parametrize(("k", "granularity"), [(2, "neuron"), (1.5, "neuron"), (1, "layer"), (1, "network")])
def test_ties_go_to_the_first(k: float, granularity: Any) -> None:
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    selection = select(scores_of(ones), k=k, granularity=granularity)
    flat = selection.places["first.weight"].flat.tolist()
    match granularity, k:
        case "neuron", 2:
            assert flat == [0, 1, 6, 7, 12, 13, 18, 19]
        case "neuron", _:  # nine of the eighteen neurons get a second connection, from the first on
            assert flat == [0, 1, 6, 7, 12, 13, 18, 19]
            assert counts_of(selection, "conv.weight") == [2, 2, 2, 2, 2]
            assert counts_of(selection, "up.weight") == [1] * 6
        case "layer", _:
            assert flat == [0, 1, 2, 3]
        case _:
            assert flat == list(range(18))
            assert list(selection.places) == ["first.weight"]


def test_places_are_in_the_matrix_not_in_the_stored_weight() -> None:
    values = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    values["up.weight"][:, 1] = 1.0
    selection = select(scores_of(values), k=1)
    assert selection.places["up.weight"].columns.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one"),
        ({"k": 1, "budget": 0.1}, "give exactly one"),
        ({"k": 0}, "k=0; expected a number above 0"),
        ({"k": -1.5}, "expected a number above 0"),
        ({"k": float("nan")}, "expected a number above 0"),
        ({"k": float("inf")}, "expected a number above 0"),
        ({"k": True}, "expected a number above 0"),
        ({"k": "2"}, "expected a number above 0"),
        ({"budget": 0.0}, "budget=0.0; expected a number above 0"),
        ({"budget": 1.01}, r"expected a fraction of the backbone's connections in \(0, 1\]"),
        ({"k": 0.5}, r"0.5 connections a neuron; granularity 'neuron' needs at least one"),
        ({"budget": 0.01}, "granularity 'neuron' needs at least one"),
        ({"k": 0.001, "granularity": "network"}, "the selection is empty"),
        ({"k": 0.001, "granularity": "layer"}, "the selection is empty"),
        ({"k": 1, "granularity": "filter"}, "expected 'neuron', 'layer' or 'network'"),
        ({"k": 1, "bias": True}, "bias=True; expected 'all' or 'none'"),
        ({"k": 1, "relative_position": "some"}, "relative_position='some'"),
        ({"k": 1, "exclude": ["blok.*"]}, "no module matches 'blok.*' \\(did you mean 'block"),
        ({"k": 1, "exclude": "head"}, "no module matches 'head'"),
        ({"k": 1, "exclude": ["*"]}, "no weight is left to select from"),
        ({"k": 1, "roles": {"nothing.*": "bias"}}, "no parameter matches 'nothing.*'"),
        ({"k": 1, "roles": {"table": "gain"}}, "'gain' .* is no role"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(scores_of(), **arguments)


def test_scores_of_another_kind() -> None:
    with pytest.raises(SelectionError, match="select got dict; expected the scores of an importance function"):
        select(dict(scores_of()), k=1)  # type: ignore[arg-type]


def test_what_is_trained_whole() -> None:
    scores = scores_of()
    biases = ("first.bias", "conv.bias", "up.bias")
    plain = select(scores, k=1)
    assert plain.dense[Role.BIAS] == biases
    assert plain.whole == biases
    assert plain.head == ("head.weight", "head.bias")
    assert plain.trained == 18 + (4 + 5 + 6) + 8
    assert select(scores, k=1, bias="none").whole == ()
    assert select(scores, k=1, norm="all").whole == (*biases, "block.0.weight", "block.0.bias")
    by_hand = select(scores, k=1, roles={"table": "scale", "first.weight": "other", "conv.bias": Role.NORM})
    assert by_hand.whole == ("first.bias", "up.bias", "table")
    assert "first.weight" not in by_hand.places
    assert select(scores, k=1, roles={"table": "relative_position"}, relative_position="all").whole == (
        *biases,
        "table",
    )


def test_nothing_inside_an_excluded_module_is_trained() -> None:
    scores = scores_of()
    selection = select(scores, k=1, norm="all", exclude=["block", "con?"])
    assert list(selection.places) == ["first.weight", "up.weight"]
    assert selection.whole == ("first.bias", "up.bias")
    assert select(scores, k=1, exclude="block.1").per_layer()["block.1.weight"] == 0
    assert select(scores, k=1, exclude=()) == select(scores, k=1)


@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from(["layer", "network"]))
@settings(max_examples=60, deadline=None)
def test_layer_and_network_agree_with_a_stable_sort(seed: int, tenths: int, granularity: Any) -> None:
    """Many ties, zeros of both signs, numbers of very different sizes and two dtypes: the order of a stable sort."""
    draw = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, -0.0, 1e-42, 1e-30, 0.5, 0.5 + 2**-24, 1.0, 3e38])
    values = {name: levels[torch.randint(len(levels), shape, generator=draw)] for name, shape in SHAPES.items()}
    for value in values.values():
        value.view(-1)[0] = 2.0
    first = next(iter(values))
    values[first] = values[first].double() + 2.0**-60  # tells float64 scores apart from float32 ones
    scores, k = scores_of(values), tenths / 10
    selection = select(scores, k=k, granularity=granularity)
    matrices = matrices_of(scores)
    groups = [matrices] if granularity == "network" else [{name: m} for name, m in matrices.items()]
    for group in groups:
        flat = torch.cat([m.reshape(-1).double() for m in group.values()])
        count = round(sum(m.shape[0] * min(k, m.shape[1]) for m in group.values()))
        wanted = torch.zeros(len(flat), dtype=torch.bool)
        wanted[flat.sort(descending=True, stable=True).indices[:count]] = True
        masks = [
            selection.places[n].mask() if n in selection.places else torch.zeros(m.shape, dtype=torch.bool)
            for n, m in group.items()
        ]
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), wanted)


@given(st.integers(0, 20), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_by_column_all_neurons_of_a_layer_have_the_same_k_of_most_energy(seed: int, k: int) -> None:
    scores = scores_of(seed=seed)
    selection = select(scores, k=k, granularity="columns")
    assert selection.connections == select(scores, k=k).connections
    for name, matrix in matrices_of(scores).items():
        mask = selection.places[name].mask()
        sets = 2 if name == "up.weight" else 1  # two groups, each with inputs of its own
        for part, chosen in zip(matrix.chunk(sets), mask.chunk(sets), strict=True):
            assert bool((chosen == chosen[0]).all())
            energy = part.square().sum(0)
            expected = energy.argsort(descending=True)[:k]
            assert set(chosen[0].nonzero().flatten().tolist()) == set(expected.tolist())


def test_by_column_small_scores_are_told_apart_and_ties_go_to_the_first() -> None:
    tiny = {name: torch.full(shape, 1e-30) for name, shape in SHAPES.items()}
    tiny["first.weight"][:, 3] = 2e-30
    places = select(scores_of(tiny), k=1, granularity="columns").places
    assert places["first.weight"].columns.tolist() == [3] * 4
    assert places["conv.weight"].columns.tolist() == [0] * 5


def test_by_column_groups_and_experts_have_columns_of_their_own() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 9, 2, groups=3)

    model = Grouped()
    scores = fewtune.magnitude_importance(model, head=None)
    with torch.no_grad():
        for group, column in enumerate((5, 0, 7)):
            scores["conv.weight"].view(9, 8)[3 * group : 3 * group + 3, column] = 1.0
    places = select(scores, k=1, granularity="columns").places["conv.weight"]
    assert places.columns.tolist() == [5] * 3 + [0] * 3 + [7] * 3
    assert View((3, 4, 2), "experts").sets == View((3, 2, 4), "experts transposed").sets == 3


@pytest.mark.parametrize("how", [{"k": 1.5}, {"k": 0.5}, {"budget": 0.2}])
def test_by_column_k_is_whole(how: Any) -> None:
    with pytest.raises(SelectionError, match=r"the same whole number of them: take k=\d"):
        select(scores_of(), granularity="columns", **how)


def test_a_selection_of_an_old_file_whose_views_know_no_groups_is_of_the_same_model() -> None:
    anatomy = describe(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), None)
    assert anatomy.views["0.weight"] == View((6, 2, 3, 3), "rows", 2)
    old = replace(anatomy, views={"0.weight": View((6, 2, 3, 3), "rows")})
    places = {"0.weight": Places(6, 18, torch.arange(0, 108, 18))}
    now, then = Selection(anatomy, places, {}), Selection(old, places, {})
    assert now.overlap(then).shared == 1
    assert (now | then) == now == then
