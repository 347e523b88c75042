"""Results of a grid: accuracy (or Dice) over seeds, cost, and paired differences; only finished runs are read."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.bench.foreman import status
from fewtune.bench.grid import Grid
from fewtune.bench.intervals import Difference, mean_difference, over_seeds_and_images
from fewtune.bench.ledger import Ledger
from fewtune.bench.plan import Run
from fewtune.bench.record import Record
from fewtune.config import Recipe
from fewtune.errors import DataError
from fewtune.tasks import TASKS


@dataclass(frozen=True)
class Cell:
    """One method on one task: the finished seeds of it. Times are medians over the seeds."""

    task: str
    method: str
    recipe: Recipe
    """Of its first finished seed."""
    runs: Mapping[int, Record]
    """Seed -> what is kept of its run."""
    chosen: dict[str, Any]
    """What was chosen on validation images."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The finished seeds."""
        return tuple(self.runs)

    @property
    def metrics(self) -> tuple[dict[str, Any], ...]:
        """What was measured of each seed."""
        return tuple(record.metrics or {} for record in self.runs.values())

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a training step of `recipe.batch_size` images; None for methods without steps."""
        return self._median("step_seconds")

    @property
    def selection_seconds(self) -> float | None:
        """Seconds of the pass over the training images that scores all connections; None where there is none."""
        return self._median("selection_seconds")

    @property
    def loss(self) -> float | None:
        """Mean test loss over seeds, in nats; None where there is none."""
        losses = [metrics["test"]["loss"] for metrics in self.metrics if "loss" in metrics.get("test", {})]
        return statistics.fmean(losses) if losses else None

    def _median(self, key: str) -> float | None:
        known = [metrics[key] for metrics in self.metrics if key in metrics]
        return statistics.median(known) if known else None

    @property
    def measure(self) -> str:
        """What of the test images is told: accuracy, or for masks Dice."""
        return TASKS[self.recipe.task].metric

    @property
    def values(self) -> tuple[float, ...]:
        """The measure of each seed, 0..1; empty where there are no test images."""
        return tuple(metrics["test"][self.measure]["value"] for metrics in self.metrics if "test" in metrics)

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def trained(self) -> int:
        """Number of trained parameters, head included."""
        return self.metrics[0]["trained"]

    @property
    def percent(self) -> float:
        """Trained parameters in percent of the backbone's."""
        return self.metrics[0]["percent_of_backbone"]

    @property
    def delta_bytes(self) -> int:
        """Size of the task file."""
        return self.metrics[0]["delta_bytes"]

    @property
    def peak_memory(self) -> int:
        """Bytes, the most of all seeds: training and test, the choice of connections left out."""
        return max(metrics["peak_memory_bytes"] for metrics in self.metrics)

    @property
    def test_seconds_per_image(self) -> float | None:
        """Seconds of reading the test set, per image."""
        told = [m["test_seconds"] / m["test"]["images"] for m in self.metrics if "test_seconds" in m]
        return statistics.median(told) if told else None


def collect(grid: Grid, out: Path) -> dict[tuple[str, str], Cell]:
    """(task, method) -> what came out, for all that have at least one finished seed."""
    seen, ledger = status(grid, out), Ledger(grid, out)
    finished: dict[tuple[str, str], list[Run]] = {}
    for name in seen.done:
        run = seen.runs[name]
        if run.kind == "train":
            finished.setdefault((run.task, run.method), []).append(run)
    cells = {}
    for task, method in itertools.product(grid.tasks, grid.methods):
        if runs := finished.get((task, method)):
            best = ledger.best([seen.runs[name] for name in runs[0].needs])[0]
            records = {run.seed: ledger.record(run, run.recipe(grid, best)) for run in runs}
            cells[task, method] = Cell(task, method, runs[0].recipe(grid, best), records, best)
    return cells


def record_all(grid: Grid, out: Path) -> list[Record]:
    """The records of all finished runs, in the grid's order, then those of its record file that it does not ask for."""
    seen, ledger = status(grid, out), Ledger(grid, out)
    records = {name: ledger.record(seen.runs[name], ledger.recipe(seen.runs[name], seen.runs)) for name in seen.done}
    return list((records | {name: one for name, one in ledger.recorded.items() if name not in records}).values())


def difference(first: Cell, second: Cell) -> Difference | None:
    """The measure of `second` minus that of `first` on the same test images, over the seeds that both have.

    None where they share no seed, or the measure is no mean over images. See `over_seeds_and_images` for what the
    interval holds.

    Raises:
        DataError: they were tested on different images.
    """
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    if not seeds or not first.values or any(cell.runs[s].by_image is None for cell in (first, second) for s in seeds):
        return None
    if len({cell.runs[seed].images for cell in (first, second) for seed in seeds}) > 1:
        raise DataError(f"{first.method} and {second.method} were tested on different images of {first.task}")
    return over_seeds_and_images(np.stack([second.runs[seed].values() - first.runs[seed].values() for seed in seeds]))


def over_tasks(grid: Grid, cells: Mapping[tuple[str, str], Cell], first: str, second: str) -> Difference | None:
    """The mean over tasks of `second` minus `first`; None where a task lacks one of them."""
    by_task = []
    for task in grid.tasks:
        pair = cells.get((task, first)), cells.get((task, second))
        one = None if pair[0] is None or pair[1] is None else difference(pair[0], pair[1])
        if one is None:
            return None
        by_task.append(one)
    return mean_difference(by_task)


def to_json(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """Every cell as plain numbers: what the tables are made from."""
    cells = collect(grid, out)
    rows = []
    for (task, method), cell in cells.items():
        base = cells.get((task, grid.baseline))
        between = None if base is None or base is cell else difference(base, cell)
        rows.append(
            {
                "task": task, "method": method, "model": cell.recipe.model, "seeds": list(cell.seeds),
                "measure": cell.measure, "values": list(cell.values),
                "mean": cell.mean, "standard_deviation": cell.deviation, "test_loss": cell.loss,
                f"minus_{grid.baseline}": between and [between.value, between.low, between.high],
                "test_images": cell.metrics[0].get("test", {}).get("images"), "chosen": cell.chosen,
                "trained": cell.trained, "percent_of_backbone": cell.percent, "step_seconds": cell.step_seconds,
                "test_seconds_per_image": cell.test_seconds_per_image, "peak_memory_bytes": cell.peak_memory,
                "selection_seconds": cell.selection_seconds, "delta_bytes": cell.delta_bytes,
            }
        )  # fmt: skip
    return rows
