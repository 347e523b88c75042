"""Before a grid starts: missing data of all tasks is told at once, and how long the runs will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fewtune.bench.estimate import Sizes, seconds_a_pass, sizes_of
from fewtune.config import recipe_from
from runs import coloured_folder, fewtune

TINY: dict[str, Any] = {
    "model": "timm:test_vit",
    "pretrained": False,
    "image_size": 32,
    "epochs": 3,
    "test_fraction": 0.25,
}


def test_missing_data_of_every_task_is_told_before_any_work(tmp_path: Path) -> None:
    tasks = {
        "there": {"data": str(coloured_folder(tmp_path / "there"))},
        "one": {"data": "nowhere"},
        "two": {"data": "no.csv"},
    }
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"settings": TINY, "tasks": tasks, "methods": {"bias": {"method": "bias"}}}))
    done = fewtune("bench", "run", grid, "--out", tmp_path / "out")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "2 mistakes in the grid's data: tasks.one: " in line
    assert "nowhere" in line
    assert "tasks.two: " in line
    assert not (tmp_path / "out").exists()


def test_sizes_and_passes(tmp_path: Path) -> None:
    recipe = recipe_from({**TINY, "data": str(coloured_folder(tmp_path / "there")), "method": "bias"})
    (sizes,) = sizes_of({"there": recipe}).values()
    assert sizes == Sizes(train=22, val=5, test=9)  # 36 images
    assert sizes.passes("train", recipe) == pytest.approx(3 * 27 + 9 / 3)
    assert sizes.passes("choose", recipe) == pytest.approx(3 * (22 + 5 / 3))
    assert sizes.passes("train", recipe.changed(stop_after=1)) == pytest.approx(27 + 9 / 3)
    assert sizes.passes("train", recipe.changed(method="linear")) == pytest.approx(36 / 3)


def test_seconds_of_finished_runs_come_before_a_trial() -> None:
    recipe = recipe_from({**TINY, "data": "x"})
    assert seconds_a_pass([(10.0, 5.0), (20.0, 10.0)], recipe, 1) == 0.5
    assert seconds_a_pass([(10.0, 5.0), (20.0, 10.0), (10.0, 9000.0)], recipe, 1) == 0.5  # the last was left overnight
    assert seconds_a_pass([], recipe, 1) > 0
