"""What came out of a grid: accuracy (or Dice) over seeds, cost, and paired differences; only finished runs are read."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.bench.grid import Grid
from fewtune.bench.job import read_json
from fewtune.bench.plan import Run, plan
from fewtune.config import Recipe, read_recipe
from fewtune.errors import DataError
from fewtune.metrics import Interval, bootstrap
from fewtune.training.folder import RunFolder
from fewtune.training.probabilities import read_hits

MEASURES = {"classification": "accuracy", "segmentation": "dice"}
"""What is told of the test images of each kind of task."""


@dataclass(frozen=True)
class Cell:
    """One method on one task: the finished seeds of it. Times are medians over the seeds."""

    task: str
    method: str
    recipe: Recipe
    """Of its first finished seed."""
    seeds: tuple[int, ...]
    metrics: tuple[dict[str, Any], ...]
    """What stands in each seed's metrics.json."""
    chosen: dict[str, Any]
    """What was chosen on validation images."""
    step_seconds: float | None
    """Seconds of a training step of `recipe.batch_size` images; None for methods without steps."""
    selection_seconds: float | None
    """Seconds of the pass over the training images that scores all connections; None where there is none."""

    @property
    def measure(self) -> str:
        """What of the test images is told: accuracy, or for masks Dice."""
        return MEASURES[self.recipe.task]

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
    runs: dict[tuple[str, str], list[Run]] = {}
    for run in plan(grid).values():
        if run.kind == "train" and run.result(out).exists():
            runs.setdefault((run.task, run.method), []).append(run)
    return {
        (task, method): _cell(runs[task, method], out)
        for task in grid.tasks
        for method in grid.methods
        if (task, method) in runs
    }


def _cell(runs: list[Run], out: Path) -> Cell:
    folders = [RunFolder(out / run.name) for run in runs]
    choice = folders[0].path.parent / "chosen.json"
    metrics = tuple(read_json(folder.metrics) for folder in folders)
    steps = [_step_seconds(folder, one) for folder, one in zip(folders, metrics, strict=True)]
    files = [folder.path / "importance.json" for folder in folders]
    selecting = [read_json(file)["seconds"] for file in files if file.exists()]
    timed = [seconds for seconds in steps if seconds is not None]
    return Cell(
        runs[0].task,
        runs[0].method,
        read_recipe([folders[0].config]),
        tuple(run.seed for run in runs),
        metrics,
        read_json(choice)["chosen"] if choice.exists() else {},
        statistics.median(timed) if timed else None,
        statistics.median(selecting) if selecting else None,
    )


def _step_seconds(folder: RunFolder, metrics: dict[str, Any]) -> float | None:
    """Median over epochs; the training has no validation in it."""
    history = folder.history.with_suffix(".json")
    if not history.exists():
        return None
    steps = math.ceil(metrics["train_images"] / read_recipe([folder.config]).batch_size)
    return statistics.median(entry["seconds"] / steps for entry in read_json(history))


def difference(out: Path, first: Cell, second: Cell) -> Interval | None:
    """The measure of `second` minus that of `first` on the same test images, over the seeds that both have.

    An image's value is the mean over seeds of the difference of its hits (of its Dice); the interval (95 %) is of the
    mean over resampled images, so it says how far the test images leave room, not how far other seeds would. None
    where they share no seed.
    """
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    if not seeds or not first.values:
        return None
    differences = []
    for seed in seeds:
        a, b = (_by_image(out / cell.task / cell.method / f"seed-{seed}", cell.measure) for cell in (first, second))
        if a.keys() != b.keys():
            raise DataError(f"{first.method} and {second.method} were tested on different images of {first.task}")
        differences.append([b[name] - a[name] for name in a])
    return bootstrap(np.mean(differences, axis=0))


def _by_image(folder: Path, measure: str) -> dict[str, float]:
    """Name of a test image -> 1 or 0 for right or wrong, or its Dice."""
    file = RunFolder(folder).predictions
    if measure == "accuracy":
        return read_hits(file)
    with file.open(encoding="utf-8", newline="") as opened:
        return {row["file"]: float(row[measure]) for row in csv.DictReader(opened)}


def to_json(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """Every cell as plain numbers: what the tables are made from."""
    cells = collect(grid, out)
    rows = []
    for (task, method), cell in cells.items():
        base = cells.get((task, grid.baseline))
        between = None if base is None or base is cell else difference(out, base, cell)
        rows.append(
            {
                "task": task, "method": method, "model": cell.recipe.model, "seeds": list(cell.seeds),
                "measure": cell.measure, "values": list(cell.values),
                "mean": cell.mean, "standard_deviation": cell.deviation,
                f"minus_{grid.baseline}": between and [between.value, between.low, between.high],
                "test_images": cell.metrics[0].get("test", {}).get("images"), "chosen": cell.chosen,
                "trained": cell.trained, "percent_of_backbone": cell.percent, "step_seconds": cell.step_seconds,
                "test_seconds_per_image": cell.test_seconds_per_image, "peak_memory_bytes": cell.peak_memory,
                "selection_seconds": cell.selection_seconds, "delta_bytes": cell.delta_bytes,
            }
        )  # fmt: skip
    return rows
