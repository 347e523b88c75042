"""The grids of benchmarks/studies and the page made from what is recorded."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fewtune.bench.grid import Grid, grid_from, read_grid
from fewtune.bench.plan import Run
from fewtune.bench.record import Record, read_records
from fewtune.bench.results import Cell

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import page

    return page


@pytest.mark.parametrize("name", ["evidence-cnn", "evidence-vit", "evidence-augmented", "few-shot", "segmentation"])
def test_grids_have_no_mistakes_and_records_can_be_read(name: str) -> None:
    grid = read_grid(STUDIES / f"{name}.yaml")
    assert grid.record == str(STUDIES / "results" / f"{name}.jsonl")
    for record in read_records(Path(grid.record)).values():
        if record.kind == "train":
            assert record.metrics is not None
            test = record.metrics["test"]
            told = test["dice" if name == "segmentation" else "accuracy"]["value"]
            assert record.values().mean() == pytest.approx(told)
            assert len(record.values()) == test["images"]


def test_the_page_is_made_from_records_alone(page: ModuleType) -> None:
    text = page.page()
    for heading in ("## Protocol", "## Claims of the paper", "## EfficientNet-Lite0", "## ViT-S/14", "## Older"):
        assert heading in text
    assert "runs are done." in text


def _cells(accuracies: dict[str, list[float]]) -> tuple[Grid, dict[tuple[str, str], Cell]]:
    """Two tasks of 1,000 test images, on which the methods' hits are drawn apart from each other."""
    methods = {name: {"method": "bias"} for name in accuracies}
    tasks = {"a": {"data": "a"}, "b": {"data": "b"}}
    grid = grid_from({"settings": {"model": "timm:test_vit"}, "tasks": tasks, "methods": methods, "seeds": [0, 1, 2]})
    cells, rng = {}, np.random.default_rng(0)
    for name, by_task in accuracies.items():
        for task, accuracy in zip(tasks, by_task, strict=False):
            runs = {}
            for seed in grid.seeds:
                hits = rng.random(1000) < accuracy
                metrics = {"test": {"images": 1000, "accuracy": {"value": float(hits.mean())}}}
                bits = np.packbits(hits).tobytes().hex()
                run = Run("train", task, name, seed)
                runs[seed] = Record(run.name, "train", "", 1.0, {}, "", metrics=metrics, images=task, by_image=bits)
            cells[task, name] = Cell(task, name, grid.recipe(task, name, {}, 0), runs, {})
    return grid, cells


def test_verdicts(page: ModuleType) -> None:
    grid, cells = _cells({"gps": [0.8, 0.9], "worse": [0.6, 0.7], "equal": [0.8, 0.9], "part": [0.5]})

    def said(better: str, worse: str) -> tuple[str, str, str]:
        return page.verdict(page.Claim("", better, worse), grid, cells)

    mean, verdict, by_task = said("gps", "worse")
    assert mean.startswith("+")
    assert verdict.startswith("holds")
    assert by_task.startswith("a +")
    assert said("worse", "gps")[1].startswith("the contrary")
    assert said("gps", "equal")[1].startswith("not told apart")
    assert said("gps", "part")[1] == "not measured yet on all tasks"
    assert said("gps", "lora")[1] == "not measured yet"
