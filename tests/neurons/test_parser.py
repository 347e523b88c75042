"""The one parser of a model's anatomy in JSON, against the two that it replaced: it reads all that either read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewtune.neurons import Anatomy, Places, Role, View

NUMBERS = st.one_of(st.integers(-1, 7), st.sampled_from([2**31, 2**40 - 1, 2**40, 2**48, 2**48 + 1, True, 1.0, None]))
VIEWS = st.one_of(
    st.tuples(
        st.lists(NUMBERS, max_size=5), st.sampled_from(["rows", "columns", "transposed", "row", None]), NUMBERS
    ).map(list),
    st.lists(st.one_of(NUMBERS, st.text(max_size=3), st.lists(NUMBERS, max_size=3)), max_size=4),
    st.one_of(st.none(), st.integers(), st.text(max_size=4), st.dictionaries(st.text(max_size=2), NUMBERS)),
)


def of_selections(data: Any) -> View:
    """The reference of selection files, version 0.1.0."""

    def sizes(data: Any) -> tuple[int, ...]:
        if not isinstance(data, list) or not all(type(n) is int and 0 <= n < 2**40 for n in data):
            raise ValueError
        return tuple(data)

    shape, kind, (groups,) = sizes(data[0]), data[1], sizes(data[2:])
    if kind not in ("rows", "columns", "transposed") or not groups:
        raise ValueError
    if len(shape) < {"rows": 1, "columns": 2, "transposed": 3}[kind] or (kind == "transposed" and shape[0] % groups):
        raise ValueError
    return View(shape, kind, groups)


def of_deltas(data: Any) -> View:
    """The reference of delta files, version 0.1.0."""

    def number(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= 2**48:
            raise ValueError
        return value

    size, kind, groups = data
    if not isinstance(size, list):
        raise ValueError
    size, groups = tuple(map(number, size)), number(groups)
    match kind:
        case "rows" if len(size) >= 1 and groups >= 1:
            return View(size, "rows", groups)
        case "columns" if len(size) == 2 and groups >= 1:
            return View(size, "columns", groups)
        case "transposed" if len(size) >= 2 and groups >= 1 and size[0] % groups == 0:
            return View(size, "transposed", groups)
    raise ValueError


def read(parser: Any, data: Any) -> View | None:
    try:
        result = parser(data)
    except (TypeError, ValueError, LookupError, AttributeError):
        return None
    assert isinstance(result, View)
    return result


@given(VIEWS)
@settings(max_examples=3000, deadline=None)
def test_all_that_either_read(data: Any) -> None:
    before = [view for view in (read(of_selections, data), read(of_deltas, data)) if view is not None]
    merged = read(View.from_json, data)
    if before:
        assert all(view == merged for view in before)
    elif merged is not None:  # more than either read: only sizes of one that the other's rule allows
        assert merged.kind == "columns"
        assert len(merged.shape) > 2
        assert max(*merged.shape, merged.groups) >= 2**40


@pytest.mark.parametrize("view", [View((2, 5, 3), "columns"), View((4, 3), "transposed", 2), View((6, 2, 3), "rows")])
def test_both_kinds_of_file_hold_them(view: View) -> None:
    """3-D columns and 2-D transposed: the matrix, its inverse and the stored places agree."""
    anatomy = Anatomy({"w": view}, {"b": Role.BIAS}, {"w": view.shape, "b": (1,)})
    assert Anatomy.from_json(anatomy.to_json()) == anatomy
    weight = torch.arange(float(torch.tensor(view.shape).prod())).view(view.shape)
    matrix = view.matrix(weight)
    assert matrix.shape == (view.neurons, view.fan_in)
    assert torch.equal(view.stored(matrix), weight)
    places = Places.from_mask(torch.ones(view.neurons, view.fan_in, dtype=torch.bool))
    assert torch.equal(weight.view(-1)[view.stored_index(places.flat)], matrix.reshape(-1))
