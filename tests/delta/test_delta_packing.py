"""Places packed into few bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewtune.delta.packing import (
    Layout,
    bit_length,
    decode,
    decode_all,
    encode,
    encode_all,
    expand,
    pack,
    squeeze,
    unpack,
)
from fewtune.neurons import Places


@st.composite
def places(draw: st.DrawFn) -> Places:
    neurons, fan_in = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.rand(neurons, fan_in, generator=generator)
    hot = torch.rand(fan_in, generator=generator) < draw(st.sampled_from([0.05, 0.5, 1.1]))
    scores[:, ~hot] -= 1
    if (k := draw(st.integers(0, 6))) > 0:
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(min(k, fan_in)).indices, True)
    else:
        mask = scores > draw(st.sampled_from([-1.1, 0.0, 0.5, 0.97]))
        mask.view(-1)[draw(st.integers(0, mask.numel() - 1))] = True
    return Places.from_mask(mask)


@settings(max_examples=200, deadline=None)
@given(st.lists(places(), min_size=1, max_size=5))
def test_places_survive(layers: list[Places]) -> None:
    named = {f"layer{i}": p for i, p in enumerate(layers)}
    layouts, tables, numbers = encode_all(named)
    tables, numbers = (
        unpack(pack(x, bits), bits, len(x)) for x, bits in ((t, bit_length(t)) for t in (tables, numbers))
    )
    got = dict(decode_all(layouts, {n: (p.neurons, p.fan_in) for n, p in named.items()}, tables, numbers))
    assert got == named


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.data())
def test_integers_survive(bits: int, data: st.DataObject) -> None:
    integers = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=200))
    array = np.array(integers, dtype=np.uint64)
    assert unpack(pack(array, bits), bits, len(array)).tolist() == integers
    assert bit_length(array) <= bits


@pytest.mark.parametrize("data", [b"", b"a", bytes(1000), bytes(range(256)) * 3])
def test_squeeze_and_expand(data: bytes) -> None:
    packed = squeeze(data)
    assert len(packed) <= len(data) + 1
    assert expand(packed, len(data)) == data
    for length in (len(data) - 1, len(data) + 1, 10**15):
        if length >= 0:
            with pytest.raises(ValueError, match="another length"):
                expand(packed, length)


def test_expand_refuses_a_bomb() -> None:
    bomb = squeeze(bytes(10**7))
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="another length"):
        expand(bomb, 100)


@pytest.mark.parametrize(
    ("k", "hot", "bits"), [(1, 40, 5.7), (1, 1536, 11.3), (5, 160, 6.6), (10, 260, 6.4), (5, 1536, 10.1)]
)
def test_bits_a_connection(k: int, hot: int, bits: float) -> None:
    """Near the entropy log2(C(hot, k)) / k of k of ``hot`` columns in every row, table and all overhead included."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randperm(1536, generator=generator)[:hot]
    chosen = torch.rand(3072, hot, generator=generator).topk(k).indices
    mask = torch.zeros(3072, 1536, dtype=torch.bool).scatter_(1, columns[chosen], True)
    layouts, tables, numbers = encode_all({"layer": Places.from_mask(mask)})
    assert layouts["layer"].gaps is (k > 1)
    size = 8 * sum(len(pack(x, bit_length(x))) for x in (tables, numbers)) / (3072 * k)
    exact = float(
        torch.lgamma(torch.tensor([hot + 1.0, k + 1.0, hot - k + 1.0])).double() @ torch.tensor([1.0, -1, -1]).double()
    )
    assert exact / np.log(2) / k < size < bits


@pytest.mark.parametrize(("k", "groups"), [(1, 1), (4, 1), (10, 1), (2, 16)])
def test_columns_that_all_neurons_share_cost_nothing(k: int, groups: int) -> None:
    """What lies in a file beside the values is a table of columns, by the deltas of `granularity="columns"`."""
    generator = torch.Generator().manual_seed(0)
    each = torch.rand(groups, 1, 384 // groups, generator=generator).topk(k).indices
    mask = torch.zeros(groups, 768 // groups, 384 // groups, dtype=torch.bool)
    mask.scatter_(2, each.expand(-1, 768 // groups, -1), True)
    layouts, tables, numbers = encode_all({"layer": Places.from_mask(mask.flatten(0, 1))})
    size = 8 * sum(len(pack(x, bit_length(x))) for x in (tables, numbers))
    assert size / (768 * k) < (0.7 if groups == 1 else 5.0)
    if groups == 1:
        assert layouts["layer"] == Layout(768 * k, k, True)


@pytest.mark.parametrize(
    ("layout", "table", "numbers"),
    [
        (Layout(4, 0, False), [], [0, 1, 2, 5]),  # a column out of range
        (Layout(4, 2, False), [1, 5], [0, 1, 1, 0]),  # a hot column out of range
        (Layout(4, 2, False), [1, 2], [0, 1, 2, 0]),  # a slot out of range
        (Layout(4, 2, False), [1, 1], [0, 1, 0, 1]),  # the same place twice
        (Layout(4, 0, False), [], [1, 0, 0, 1]),  # out of order
        (Layout(3, 0, False), [], [0, 0, 0]),  # not the same number in each row
        (Layout(4, 0, True), [], [0, 1, 2, 8]),  # beyond the end
        (Layout(4, 0, True), [], [0, 1, 2, 2**63]),  # beyond all integers
        (Layout(5, 0, True), [], [0, 1, 2, 1]),  # fewer than stated
        (Layout(0, 0, True), [], []),
        (Layout(4, 7, False), list(range(7)), [0, 1, 2, 3]),  # more hot columns than columns
    ],
)
def test_impossible_places(layout: Layout, table: list[int], numbers: list[int]) -> None:
    with pytest.raises(ValueError):
        decode(layout, 2, 5, np.array(table, "<u8"), np.array(numbers, "<u8"))


def test_a_forged_place_is_not_lost_among_good_ones() -> None:
    """The cases above are refused for their fault, not for their form: without it they decode."""
    good = decode(Layout(4, 2, False), 2, 5, np.array([1, 4], "<u1"), np.array([0, 1, 0, 1], "<u1"))
    assert good.flat.tolist() == [1, 4, 6, 9]
    assert decode(Layout(4, 0, True), 2, 5, np.array([], "<u1"), np.array([0, 1, 2, 1], "<u1")).flat.tolist() == [
        0,
        2,
        5,
        7,
    ]
    layout, table, numbers = encode(good)
    assert decode(layout, 2, 5, table, numbers) == good
