"""Which runs of a grid are finished: those in its folder, in its record file, and in the record files it borrows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewtune.bench.choices import Setting, chosen
from fewtune.bench.grid import Grid
from fewtune.bench.plan import Run
from fewtune.bench.record import Record, digest, read_records, record_of
from fewtune.config import Recipe
from fewtune.training.run_folder import RunFolder


class Ledger:
    """Looks runs up; a run folder comes before a record of the same name."""

    def __init__(self, grid: Grid, out: Path) -> None:
        self.grid, self.out = grid, out
        self.recorded = {} if grid.record is None else read_records(Path(grid.record))
        self.borrowed = [read_records(Path(file)) for file in grid.borrow]

    def lies_here(self, run: Run) -> bool:
        """Whether its folder holds its result."""
        return run.result(self.out).exists()

    def holds(self, run: Run, recipe: Recipe) -> bool:
        """Whether it is finished, with these settings.

        Raises:
            ConfigError: its folder holds a run with other settings.
        """
        if self.lies_here(run):
            RunFolder(self.out / run.name).resumed(recipe)
            return True
        return self._recorded(run, recipe) is not None

    def seconds(self, run: Run) -> float:
        """How long a run took whose folder lies here."""
        return float(json.loads(run.result(self.out).read_text(encoding="utf-8"))["seconds"])

    def record(self, run: Run, recipe: Recipe) -> Record:
        """The record of a finished run."""
        if self.lies_here(run):
            return record_of(run, recipe, self.out)
        found = self._recorded(run, recipe)
        assert found is not None, f"{run.name} is not finished"
        return found

    def _recorded(self, run: Run, recipe: Recipe) -> Record | None:
        """The record of a run with these settings, the grid's own before those of other grids."""
        named = (records[run.name] for records in (self.recorded, *self.borrowed) if run.name in records)
        return next((record for record in named if record.recipe == digest(recipe)), None)

    def best(self, runs: list[Run]) -> tuple[Setting, list[dict[str, Any]]]:
        """The best choice of finished choosing runs, and a row for all that was tried (see `chosen`)."""
        return chosen((run.choice, self._candidates(run)) for run in runs)

    def _candidates(self, run: Run) -> list[dict[str, Any]]:
        if self.lies_here(run):
            return json.loads(run.result(self.out).read_text(encoding="utf-8"))["candidates"]
        found = self._recorded(run, run.recipe(self.grid, {}))
        return [] if found is None else found.candidates or []

    def recipe(self, run: Run, runs: dict[str, Run]) -> Recipe:
        """Its resolved recipe; for a reported run all that it needs must be finished."""
        best = self.best([runs[name] for name in run.needs])[0] if run.needs else {}
        return run.recipe(self.grid, best)
