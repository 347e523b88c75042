"""Progress of slow work: one bar a step on a terminal, one line a step elsewhere.

(`fewtune.errors.Progress` is for what is told in words, such as what is about to be downloaded.)
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger("fewtune")

Item = TypeVar("Item")
Counted = Callable[[int, int | None], None]
"""Called as told(done, total) when a step has come further; total is None where it is not known."""

PATIENCE = 2.0
"""Seconds after which a step without a terminal says how long it will take."""

_running = False
"""Whether a step is shown already: the steps that it consists of are not shown beside it."""


def quiet_libraries() -> None:
    """Not to print what torch warns of when torchao is imported, which no user can do anything about."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def shown(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Goes through `items` and shows how many are done and how long the rest will take."""
    with counted(what, total) as told:
        for done, item in enumerate(items, 1):
            yield item
            told(done, total)


@contextmanager
def counted(what: str, total: int | None = None, before: int = 0) -> Iterator[Counted]:
    """Yields what is to be called as a step goes on; where it is not called, a bar says only that work goes on.

    `before` of the total were done earlier: they took none of this step's time.
    Silent within another step, and in processes that share a terminal with the first one.
    """
    global _running
    if _running or multiprocessing.parent_process() is not None or os.environ.get("LOCAL_RANK", "0") != "0":
        yield lambda done, total: None
        return
    _running = True
    try:
        with _drawn(what, total, before) if sys.stderr.isatty() else _written(what, before) as told:
            yield told
    finally:
        _running = False


@contextmanager
def _drawn(what: str, total: int | None, before: int) -> Iterator[Counted]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=total, completed=before)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


@contextmanager
def _written(what: str, before: int) -> Iterator[Counted]:
    begun, said = time.perf_counter(), False

    def told(done: int, total: int | None) -> None:
        nonlocal said
        seconds = time.perf_counter() - begun
        if said or seconds < PATIENCE or total is None or not before < done < total:
            return
        said = True
        left = duration(seconds / (done - before) * (total - done))
        log.info("%s: %d of %d, about %s left", what, done, total, left)

    yield told


def duration(seconds: float) -> str:
    """A rough time in the unit that reads best."""
    if seconds < 100:
        return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def size(number: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
