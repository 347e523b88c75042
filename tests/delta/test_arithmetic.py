"""Sums and means of tasks: what stands at every place, where tasks meet, whose head it is, what is refused."""

from __future__ import annotations

import pytest
import torch

from delta_cases import Small, anatomy_of, choose, made_up
from fewtune.delta import Delta
from fewtune.delta.arithmetic import add, average
from fewtune.errors import DeltaError


@pytest.fixture
def pair() -> tuple[Delta, Delta]:
    model = Small()
    anatomy = anatomy_of(model)
    names = {"class_names": ["a", "b", "c"]}
    return (
        made_up(model, choose(anatomy, 2, seed=1), seed=1, metadata={**names, "data": "first"}).delta,
        made_up(model, choose(anatomy, 2, seed=2), seed=2, metadata={**names, "data": "second"}).delta,
    )


def tuned(delta: Delta) -> dict[str, torch.Tensor]:
    model = Small()
    delta.apply(model)
    return {name: tensor.detach().double() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(("combine", "weight"), [(add, 1.0), (average, 0.5)])
def test_every_place_holds_the_sum_of_the_changes(pair: tuple[Delta, Delta], combine: object, weight: float) -> None:
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = combine(model, pair, made="of two")  # type: ignore[operator]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result_of, parts = tuned(result.delta), [tuned(delta) for delta in pair]
    for name, original in Small().named_parameters():
        start = original.detach().double()
        expected = start + weight * sum(part[name] - start for part in parts)
        if name.startswith("head"):
            expected = sum(part[name] for part in parts) / 2
        torch.testing.assert_close(result_of[name], expected, rtol=1e-6, atol=1e-6)
    assert result.delta.metadata == {**pair[0].metadata, "made": "of two"}
    met = pair[0].selection() & pair[1].selection()
    assert result.shared == met.connections > 0
    assert 0 < result.opposed < result.shared
    assert result.delta.connections == (pair[0].selection() | pair[1].selection()).connections


def test_heads_of_other_classes_need_a_word(pair: tuple[Delta, Delta]) -> None:
    model = Small(4)
    model.load_state_dict({n: t for n, t in Small().state_dict().items() if not n.startswith("head")}, strict=False)
    other = made_up(model, choose(anatomy_of(model), 1), seed=3, metadata={"class_names": list("abcd")}).delta
    with pytest.raises(DeltaError, match="say whose head to take"):
        average(Small(), [pair[0], other])
    result = average(Small(), [pair[0], other], head=other).delta
    assert torch.equal(result.whole["head.weight"], other.whole["head.weight"])
    assert result.metadata["class_names"] == list("abcd")


def test_what_cannot_be_combined_is_refused(pair: tuple[Delta, Delta]) -> None:
    with pytest.raises(DeltaError, match="expected two or more"):
        add(Small(), pair[:1])
    with pytest.raises(DeltaError, match="another backbone"):
        add(Small(seed=4), pair)
