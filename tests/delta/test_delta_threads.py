"""Several threads on one model: of two calls one comes first, and the model is left as one of the orders leaves it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from delta_cases import Small, anatomy_of, choose, made_up, same_bits, state
from fewtune.delta import Delta, applied, swap
from fewtune.errors import DeltaError

TRIALS = 300


@pytest.fixture(autouse=True)
def often_switched() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_the_same_time(*calls: Callable[[], object]) -> list[str]:
    """Runs each in a thread of its own, from one signal on; what each ended with."""
    ready, ends = threading.Barrier(len(calls)), [""] * len(calls)

    def run(i: int) -> None:
        ready.wait()
        try:
            calls[i]()
            ends[i] = "done"
        except DeltaError as error:
            ends[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def tasks(model: Small) -> list[Delta]:
    return [made_up(model, choose(anatomy_of(model), 1, seed), seed).delta for seed in (1, 2)]


def test_of_two_applies_one_is_refused() -> None:
    model = Small()
    before, deltas = state(model), tasks(model)
    for _ in range(TRIALS):
        ends = at_the_same_time(*(lambda d=d: d.apply(model) for d in deltas))
        assert sorted(end == "done" for end in ends) == [False, True], ends
        assert any("already applied" in end for end in ends)
        present = applied(model)
        assert present is deltas[ends.index("done")]
        present.revert(model)
        assert same_bits(state(model), before)


def test_of_two_reverts_one_is_refused() -> None:
    model = Small()
    before, (delta, _) = state(model), tasks(model)
    for _ in range(TRIALS):
        delta.apply(model)
        ends = at_the_same_time(*[lambda: delta.revert(model)] * 2)
        assert sorted(end == "done" for end in ends) == [False, True], ends
        assert same_bits(state(model), before)


def test_swaps_come_one_after_another() -> None:
    model = Small()
    before, deltas = state(model), tasks(model)
    for _ in range(TRIALS // 3):
        ends = at_the_same_time(*(lambda d=d: swap(model, d) for d in (*deltas, *deltas)))
        assert ends == ["done"] * 4
        applied(model).revert(model)
        assert same_bits(state(model), before)
