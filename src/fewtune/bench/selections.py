"""How the selections of a grid overlap, and how far criteria order connections as full fine-tuning moves them."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

from fewtune.analysis import rank_correlation, sharing
from fewtune.bench.grid import Grid
from fewtune.bench.tables import Table
from fewtune.selection import Selection
from fewtune.tasks import prepare
from fewtune.training.run_folder import RunFolder
from fewtune.training.tuners import score

Key = tuple[str, str, int]
"""(task, method, seed)"""


def overlaps(grid: Grid, out: Path) -> Table:
    """Pairs of saved selections that differ in one thing, the method, the seed or the task, of the same number.

    A pair of methods or tasks is of the first seed; the table gives the shared part of the connections, what
    independent choices of as many connections of each neuron would share, and how far that is from chance to equal.
    """
    saved = _saved(grid, out)
    rows = []
    for (a, one), (b, other) in combinations(saved.items(), 2):
        kind = _differ(a, b, grid.seeds[0])
        if kind is not None and one.anatomy.views == other.anatomy.views and one.connections == other.connections:
            (pair,) = sharing({"/".join(map(str, a)): one, "/".join(map(str, b)): other})
            figures = (pair.shared, pair.chance, pair.above_chance)
            rows.append((kind, pair.first, pair.second, *("" if math.isnan(f) else f"{f:.3f}" for f in figures)))
    rows.sort(key=lambda row: row[0])
    columns = ("differ in", "first", "second", "shared", "by chance", "from chance (0) to equal (1)")
    return Table("Overlap of selections", columns, tuple(rows), text_columns=3)


def agreement(grid: Grid, out: Path, full: str = "full") -> Table:
    """Spearman's rank correlation of scores with how far full fine-tuning moved each weight, |w_full - w_0|.

    Of the first seed, for every task in which the run of `full` is finished: over the connections of each neuron (what
    a selection by neuron depends on) and over the whole network. The scores are taken anew, on the training images.
    """
    rows = []
    for task in grid.tasks:
        oracle = RunFolder(out / task / full / f"seed-{grid.seeds[0]}")
        if not oracle.delta.exists():
            continue
        work = prepare(grid.recipe(task, grid.baseline, {}, grid.seeds[0], train_on="train+val"))
        moved = score(work.renewed(work.recipe.changed(importance="oracle", oracle=str(oracle.delta))))
        for criterion in ("gradient", "magnitude", "random"):
            changed = work.recipe.changed(importance=criterion)
            ranks = rank_correlation(score(work.renewed(changed)), moved)
            by_neuron = [value for value in ranks.neurons.values() if not math.isnan(value)]
            mean = sum(by_neuron) / len(by_neuron)
            rows.append((grid.tasks[task].title or task, criterion, f"{mean:+.3f}", f"{ranks.network:+.3f}"))
    columns = ("task", "criterion", "within neurons (mean over layers)", "over the network")
    return Table("Rank correlation with what full fine-tuning moved", columns, tuple(rows), text_columns=2)


def _saved(grid: Grid, out: Path) -> dict[Key, Selection]:
    keys = [(task, name, seed) for task in grid.tasks for name in grid.methods for seed in grid.seeds_of(name)]
    files = {key: RunFolder(out / key[0] / key[1] / f"seed-{key[2]}").selection for key in keys}
    gps = {key for key in keys if grid.recipe(key[0], key[1], {}, key[2]).method == "gps"}
    return {key: Selection.load(file) for key, file in files.items() if key in gps and file.exists()}


def _differ(a: Key, b: Key, seed: int) -> str | None:
    """The one thing in which two runs differ, where it is compared; None else."""
    match tuple(x == y for x, y in zip(a, b, strict=True)):
        case (True, False, True) if a[2] == seed:
            return "method"
        case (True, True, False) if a[2] == seed:
            return "seed"
        case (False, True, True) if a[2] == seed:
            return "task"
    return None
