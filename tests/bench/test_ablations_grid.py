"""The grid of the ablations: what would be run is what the page says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("ablations_grid", None)
    import ablations_grid

    monkeypatch.setattr(ablations_grid, "source", lambda name, cache: str(cache / name))
    return ablations_grid


def test_every_trial_has_a_recipe_and_a_folder_of_its_own(grid: Any, tmp_path: Path) -> None:
    for group in grid.RATES:
        (tmp_path / f"rate-{group}.json").write_text('{"lr": 0.002}')
    assert len({trial.key for trial in grid.TRIALS}) == len(grid.TRIALS)
    for trial in grid.TRIALS:
        recipe = grid.recipe_of(trial, tmp_path, tmp_path)
        assert recipe.seed == trial.draw.seed
        assert recipe.shots == trial.draw.shots
        assert recipe.method == trial.method
        assert (recipe.selection is not None) == (trial.method == "gps")
        assert recipe.lr == (1e-3 if trial.method == "linear" else 2e-3)
        for key, value in trial.settings.items():
            assert getattr(recipe, key) == (tuple(value) if isinstance(value, list) else value)


def test_all_ablations_of_the_paper_are_in_the_grid(grid: Any) -> None:
    first = {trial.name: trial for trial in grid.TRIALS if trial.draw == grid.Draw(grid.TASK, 0)}
    assert {*grid.CRITERIA, "full", "linear", "k2", "k5", "k10", "k20"} <= set(first)
    for n in (3, 6, 9):
        assert first[f"without-first-{n}"].settings["exclude"] == [f"blocks.{block}" for block in range(n)]
    assert {f"without-block-{block}" for block in range(12)} <= set(first)
    few = {(t.draw.shots, t.name) for t in grid.TRIALS if t.draw.shots is not None}
    assert few == {(shots, name) for shots in (1, 2, 4, 8, 16) for name in ("gps", "full", "linear")}


def test_oracles_come_of_full_fine_tuning_on_the_same_images(grid: Any, tmp_path: Path) -> None:
    oracles = [trial for trial in grid.TRIALS if trial.name == "oracle"]
    fulls = {trial.key for trial in grid.TRIALS if trial.method == "full"}
    assert len(oracles) == len(grid.SEEDS)
    for trial in oracles:
        path = Path(grid.oracle_of(trial, tmp_path)["oracle"])
        assert path.name in fulls
        assert path.name.startswith(trial.draw.key)
