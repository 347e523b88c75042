"""What a selection answers: counts, summary, overlap, union and intersection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewtune
from fewtune.errors import SelectionError
from fewtune.selection import Selection, select
from selected import CONNECTIONS, SHAPES, mask_of, scores_of


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
