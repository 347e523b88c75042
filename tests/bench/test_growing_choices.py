"""Choices that grow where the best of them lies at an edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewtune.bench.choices import beyond, next_choice
from fewtune.bench.foreman import status
from fewtune.bench.grid import Grid, grid_from
from fewtune.bench.plan import Run
from fewtune.errors import ConfigError
from fewtune.training.run_folder import RunFolder

RATES = [1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        (RATES, 1e-2, 3e-2), (RATES, 1e-3, 3e-4), (RATES, 3e-3, None), ([*RATES, 3e-2], 3e-2, 1e-1),
        ([1e-3, 1e-2], 1e-2, 1e-1), ([1.0, 5.0], 1.0, 0.2), ([1e-3], 1e-3, None),
    ],
)  # fmt: skip
def test_the_series_goes_on_as_it_came(values: list[float], best: float, expected: float | None) -> None:
    assert beyond(values, best) == expected


def test_it_ends_at_its_limit() -> None:
    given = [{"lr": rate} for rate in RATES]
    assert next_choice({"lr": 1e-2}, given, {"lr": 1}, given) == {"lr": 3e-2}
    assert next_choice({"lr": 3e-2}, [*given, {"lr": 3e-2}], {"lr": 1}, given) == {}


def test_other_settings_stay_those_of_the_best() -> None:
    given = [{"lr": rate, "k": k} for rate in RATES for k in (1, 5)]
    got = next_choice({"lr": 1e-3, "k": 5, "stop_after": 3}, given, {"lr": 2}, given)
    assert got == {"lr": 3e-4, "k": 5}


def _grid(**changes: Any) -> Grid:
    return grid_from(
        {
            "settings": {"model": "timm:test_vit", "pretrained": False, "data": "images", "epochs": 2},
            "tasks": {"one": {}},
            "methods": {"gps": {"method": "gps", "choices": {"lr": RATES}}},
            "choose_epochs": False,
            "grow": {"lr": 2},
            **changes,
        }
    )


def _judge(grid: Grid, out: Path, rate: float, accuracy: float) -> None:
    """Write what a choosing run leaves behind."""
    run = Run("choose", "one", "gps", 0, {"lr": rate})
    RunFolder(out / run.name).begin(run.recipe(grid, {}))
    judged = {"candidates": [{"setting": {}, "accuracy": accuracy, "loss": 1 - accuracy}]}
    run.result(out).write_text(json.dumps(judged))


def test_the_plan_grows_until_the_best_lies_inside(tmp_path: Path) -> None:
    grid = _grid()
    for rate, accuracy in zip(RATES, (0.5, 0.6, 0.7), strict=True):
        _judge(grid, tmp_path, rate, accuracy)
    (waiting, training) = status(grid, tmp_path).waiting
    assert waiting == "one/gps/choose/lr=0.03/seed-0"
    assert waiting in status(grid, tmp_path).runs[training].needs
    _judge(grid, tmp_path, 3e-2, 0.65)
    assert status(grid, tmp_path).waiting == [training]


def test_only_positive_numbers_grow() -> None:
    with pytest.raises(ConfigError, match=r"grow\.importance: only positive numbers go on, got \['random'\]"):
        _grid(grow={"importance": 1}, choices={"importance": ["random"]})
