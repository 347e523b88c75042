"""The paper's ablations on real photographs: granularity, criterion, K, location, seeds, few shots, overlaps.

    python benchmarks/ablations.py

Runs the grid of `ablations_grid.py` and writes docs/ablations.md, its figures as JSON and its plots. Finished work is
kept and skipped, so a killed grid goes on; `--minutes` starts nothing new after so long, and the page says what is not
yet run. Every run is a `fewtune fit` with the selection that `fewtune select` would make: the best epoch by validation
images is kept, the test images are read once. Learning rates are chosen first, on validation images, one for each group
of the grid. The photographs are found through FEWTUNE_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

from ablations_analysis import draw_gps, draw_selections
from ablations_grid import COMPARED_DRAWS, DRAWS, RATES, TRIALS, Trial, recipe_of, search_recipe_of
from photographs import ROOT, one_thread, source


def search(group: str, cache: Path, out: Path) -> None:
    """Chooses the learning rate of a group of the grid by short runs, judged on validation images."""
    path = out / f"rate-{group}.json"
    if path.exists():
        return
    from fewtune.training.files import write_json
    from fewtune.training.protocol import prepare
    from fewtune.training.search import search_recipe

    found = search_recipe(prepare(search_recipe_of(group, cache)))
    write_json(path, {"lr": found.best.lr, "tried": found.rows})
    print(f"{group}: learning rate {found.best.lr}", flush=True)


def run(trial: Trial, cache: Path, out: Path) -> None:
    """One `fit`; skipped where it is done, resumed where it was killed."""
    from fewtune.training.protocol import fit

    folder = out / trial.key
    if (folder / "metrics.json").exists():
        return
    result = fit(recipe_of(trial, cache, out), folder, resume=True)
    result.folder.checkpoint.unlink(missing_ok=True)  # of full fine-tuning four times the model; needed no more
    test = result.metrics["test"]["accuracy"]
    print(f"{trial.key}: {100 * test['value']:.1f} % in {result.metrics['seconds']:.0f} s", flush=True)


def grid(processes: int, minutes: float, cache: Path, out: Path) -> None:
    """Learning rates; then for each draw of images full fine-tuning (the oracle), selections, all other runs."""
    out.mkdir(parents=True, exist_ok=True)
    for name in {draw.task for draw in (*DRAWS, *COMPARED_DRAWS)}:
        source(name, cache)
    end = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=one_thread) as pool:

        def all_of(work: Callable[..., None], items: Iterable[Any]) -> None:
            waiting = [pool.submit(in_time, end, work, item, cache, out) for item in items]
            for done in waiting:
                done.result()

        all_of(search, RATES)
        for number, (draw, group) in enumerate(groupby(TRIALS, key=attrgetter("draw"))):
            trials = list(group)
            all_of(run, [trial for trial in trials if trial.method != "gps"])  # full fine-tuning is the oracle
            all_of(draw_selections, [draw])
            if number == 0:
                all_of(draw_gps, COMPARED_DRAWS)
            all_of(run, [trial for trial in trials if trial.method == "gps"])


def in_time(end: float, work: Callable[..., None], *arguments: Any) -> None:
    """Does the work, unless the time is over. (A machine's monotonic clock is the same in all its processes.)"""
    if time.monotonic() < end:
        work(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, of one thread each")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing new after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablations")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/photographs")
    parser.add_argument("--report-only", action="store_true", help="write the page from runs that are finished")
    options = parser.parse_args()
    if not options.report_only:
        grid(options.processes, options.minutes, options.cache, options.out)
    from ablations_page import write_page

    write_page(options.out, ROOT / "docs")


if __name__ == "__main__":
    main()
