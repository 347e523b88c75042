"""Select: the largest scores by neuron, layer or network; what a Selection answers, combines, saves and loads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fewtune
from fewtune.errors import SelectionError
from fewtune.importance import Scores
from fewtune.neurons import Role, describe
from fewtune.selection import Selection, select
from fewtune.topk import top_mask


class Net(nn.Module):
    """Fan-in 6, 27, 4 and 8: a linear layer, a convolution, a transposed one, a second linear layer; norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 5, 3)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
        self.table = nn.Parameter(torch.zeros(7))
        self.head = nn.Linear(3, 2)


SHAPES = {"first.weight": (4, 6), "conv.weight": (5, 27), "up.weight": (6, 4), "block.1.weight": (3, 8)}
CONNECTIONS = 24 + 135 + 24 + 24


ANATOMY = describe(Net(), "head")


def scores_of(values: dict[str, Tensor] | None = None, seed: int = 0) -> Scores:
    """Scores of a `Net` with matrices of `SHAPES`; random ones where none are given."""
    generator = torch.Generator().manual_seed(seed)
    values = values or {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return Scores({name: ANATOMY.views[name].stored(value) for name, value in values.items()}, ANATOMY)


def matrices_of(scores: Scores) -> dict[str, Tensor]:
    return {name: scores.anatomy.views[name].matrix(score) for name, score in scores.items()}


def counts_of(selection: Selection, name: str) -> list[int]:
    """Connections of every neuron."""
    places = selection.places[name]
    return torch.bincount(places.rows, minlength=places.neurons).tolist()


def mask_of(selection: Selection, name: str) -> Tensor:
    places = selection.places.get(name)
    return torch.zeros(SHAPES[name], dtype=torch.bool) if places is None else places.mask()


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
        ({"k": 1, "exclude": ["blok.*"]}, "no module matches 'blok.*'; the nearest is 'block"),
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


def test_counts() -> None:
    selection = select(scores_of(), k=2, granularity="network")
    assert selection.connections == sum(selection.per_layer().values()) == 36
    assert list(selection.per_layer()) == list(SHAPES)
    assert selection.fraction == 36 / CONNECTIONS


def test_summary() -> None:
    lines = select(scores_of(), k=2).summary().splitlines()
    backbone = CONNECTIONS + (4 + 5 + 6) + 16 + 7
    assert lines[0].split() == ["weight", "neurons", "fan-in", "selected", "%"]
    assert lines[2].split() == ["conv.weight", "5", "27", "10", "7.407"]
    assert [line.split()[0] for line in lines[1:5]] == list(SHAPES)
    assert lines[5:] == [
        f"connections: 36 = {100 * 36 / backbone:.3f} % of the backbone",
        "trained whole, bias: 15",
        "trained whole, head: 8",
        "frozen, role unknown: table (set one with roles={pattern: role})",
        f"trained: 59; without the head 51 = {100 * 51 / backbone:.3f} % of {backbone:,}",
    ]
    known = select(scores_of(), k=2, roles={"table": "embedding"}).summary()
    assert "role unknown" not in known


def test_union_and_intersection() -> None:
    a, b = select(scores_of(seed=1), k=2), select(scores_of(seed=2), k=3, bias="none", norm="all")
    either, both = a | b, a & b
    for name in SHAPES:
        in_a, in_b, in_either, in_both = (mask_of(s, name) for s in (a, b, either, both))
        assert torch.equal(in_either, in_a | in_b)
        assert torch.equal(in_both, in_a & in_b)
    assert either.whole == ("first.bias", "conv.bias", "up.bias", "block.0.weight", "block.0.bias")
    assert both.whole == ()
    assert a | a == a
    assert a & a == a
    assert a | b == b | a
    assert a != b
    assert hash(a) == hash(select(scores_of(seed=1), k=2))


def test_selections_of_other_models_do_not_mix() -> None:
    other = select(fewtune.random_importance(nn.Linear(3, 2), head=None), k=1)
    mine = select(scores_of(), k=1)
    for mix in (mine.overlap, mine.__or__, mine.__and__):
        with pytest.raises(SelectionError, match="belong to different models"):
            mix(other)
    assert mine != other
    assert mine != "a selection"


def test_overlap_counts() -> None:
    a, b = select(scores_of(seed=1), k=2), select(scores_of(seed=2), k=3)
    both, either = (a & b).connections, (a | b).connections
    overlap = a.overlap(b)
    assert overlap.jaccard == both / either
    assert overlap.shared == both / a.connections
    assert a.overlap(a).jaccard == a.overlap(a).shared == 1
    apart = select(scores_of(), k=1, exclude=["conv", "block", "up"]).overlap(select(scores_of(), k=1, exclude="first"))
    assert (apart.jaccard, apart.shared, apart.chance_jaccard, apart.chance_shared) == (0, 0, 0, 0)


def test_overlap_by_chance_is_what_random_choices_give() -> None:
    """Random choices of the same counts in every neuron, simulated; 300 pairs leave about 0.5 % of error."""
    overlaps = []
    for seed in range(300):
        a, b = (select(scores_of(seed=s), k=k) for s, k in ((2 * seed, 2), (2 * seed + 1, 5)))
        overlaps.append(a.overlap(b))
    mean_shared = sum(o.shared for o in overlaps) / len(overlaps)
    mean_jaccard = sum(o.jaccard for o in overlaps) / len(overlaps)
    assert mean_shared == pytest.approx(overlaps[0].chance_shared, rel=0.03)
    assert mean_jaccard == pytest.approx(overlaps[0].chance_jaccard, rel=0.05)


def test_a_selection_that_fits_no_weight() -> None:
    selection = select(scores_of(), k=1)
    with pytest.raises(SelectionError, match=r"the places of conv.weight do not fit"):
        Selection(selection.anatomy, {"conv.weight": selection.places["first.weight"]}, {})
    with pytest.raises(SelectionError, match="do not fit"):
        Selection(selection.anatomy, {"nothing": selection.places["first.weight"]}, {})


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_save_and_load(tmp_path: Path, granularity: Any) -> None:
    selection = select(scores_of(), k=1.5, granularity=granularity, norm="all")
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert loaded == selection
    assert loaded.anatomy == selection.anatomy
    assert loaded.summary() == selection.summary()
    assert [path.name for path in tmp_path.iterdir()] == ["selection.safetensors"]


def altered(source: Path, target: Path, change: Any) -> Path:
    """A copy of a selection file with another header."""
    with safe_open(source, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["fewtune"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, target, {"fewtune": json.dumps(header)})
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    select(scores_of(), k=1).save(path)
    return path


def test_files_that_are_no_selection(saved: Path, tmp_path: Path) -> None:
    def refused(change: Any, message: str) -> None:
        with pytest.raises(SelectionError, match=message):
            Selection.load(altered(saved, tmp_path / "bad.safetensors", change))

    refused(lambda h, t: h.update(version=99), "has version 99; this fewtune reads up to 1: update fewtune")
    refused(lambda h, t: h.update(format="fewtune-delta"), "is a fewtune-delta file; expected a fewtune-selection")
    refused(lambda h, t: h.pop("anatomy"), "not a selection file, or it is damaged")
    refused(lambda h, t: h["dense"].update(gain=["first.bias"]), "damaged")
    refused(lambda h, t: h["dense"].update(bias=["nothing"]), "unknown parameter nothing")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"].flip(0).clone()}), "out of order")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"] + 500}), "out of order or range")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"].view(1, -1)}), "out of order or range")
    refused(lambda h, t: t.update({"nothing": t["conv.weight"].clone()}), "damaged")
    with pytest.raises(SelectionError, match="does not exist"):
        Selection.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SelectionError, match="not a selection file"):
        Selection.load(tmp_path / "other.safetensors")


def loads_or_is_refused(path: Path) -> bool:
    """Whether a file loads; anything but a selection or a SelectionError is a fault."""
    try:
        selection = Selection.load(path)
    except SelectionError:
        return False
    assert selection.trained > 0
    assert selection.summary()
    return True


def test_damaged_bytes(saved: Path, tmp_path: Path) -> None:
    good, dice = saved.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        match dice.randrange(3):
            case 0:
                bad = bad[: dice.randrange(len(bad))]
            case 1:
                bad[dice.randrange(len(bad))] = dice.randrange(256)
            case _:
                start = dice.randrange(len(bad))
                bad[start : start + dice.randrange(1, 40)] = dice.randbytes(dice.randrange(40))
        path = tmp_path / "bad.safetensors"
        path.write_bytes(bad)
        refused += not loads_or_is_refused(path)
    assert refused > 200


NONSENSE: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "weight", [], [[]], {}, {"a": 1}, [0, 0], [10**20, 10**20]]


def test_damaged_headers(saved: Path, tmp_path: Path) -> None:
    """Any value of the header replaced by any nonsense."""
    dice = random.Random(0)

    def change(header: Any, tensors: dict[str, Tensor]) -> None:
        node, key = header, dice.choice(list(header))
        while isinstance(node[key], (dict, list)) and node[key] and dice.random() < 0.8:
            node = node[key]
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if dice.random() < 0.2 and isinstance(node, dict):
            node[str(dice.choice(NONSENSE))] = node.pop(key)
        else:
            node[key] = dice.choice(NONSENSE)

    refused = sum(not loads_or_is_refused(altered(saved, tmp_path / "bad.safetensors", change)) for _ in range(400))
    assert refused > 200
