"""The grids of benchmarks/studies and the pages made from what is recorded."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from fewtune.bench.grid import Grid, grid_from, read_grid
from fewtune.bench.plan import Run, plan
from fewtune.bench.record import Record, digest, read_records, write_records
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
    assert re.search(r"\d+ of the \d+ runs of \[evidence-cnn.yaml\]", text)


SCREENS = ("recipe-screen", "recipe-screen-vit")


@pytest.mark.parametrize("name", [*SCREENS, "recipe-confirm"])
def test_grids_of_the_recipe_train_equally_many(name: str) -> None:
    grid = read_grid(STUDIES / f"{name}.yaml")
    assert grid.record == str(STUDIES / "results" / f"{name}.jsonl")
    assert len(grid.seeds) == (3 if name in SCREENS else 8)
    neurons, biases = {"recipe-screen": (21_008, 0), "recipe-screen-vit": (41_856, 41_856)}.get(name, (0, 0))
    for method in grid.methods:
        recipe = grid.recipe(next(iter(grid.tasks)), method, {}, 0)
        if name in SCREENS and recipe.method == "gps" and recipe.reach is None:
            assert (recipe.k, recipe.budget, recipe.bias) == (1, None, "all")
    if name in SCREENS:  # what lies within reach: see the grid's first lines
        recipe = grid.recipe("eurosat", "reach", {}, 0)
        within = {"recipe-screen": (12_928, 0), "recipe-screen-vit": (20_736, 20_736)}[name]
        assert round(within[0] * recipe.k) + within[1] == neurons + biases


def test_what_confirms_was_not_screened() -> None:
    screened = {t.settings["data"] for name in SCREENS for t in read_grid(STUDIES / f"{name}.yaml").tasks.values()}
    confirms = {task.settings["data"] for task in read_grid(STUDIES / "recipe-confirm.yaml").tasks.values()}
    assert not screened & confirms


def _plant(folder: Path, name: str, accuracies: dict[str, float]) -> None:
    """A grid of the studies with these methods alone, and all its runs recorded: hits drawn at these accuracies, the
    same draw of images for all methods of a seed, so that they are paired."""
    values = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    known = values["methods"]
    values["methods"] = {method: known.get(method, {"method": "bias"}) for method in accuracies}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    grid = read_grid(folder / f"{name}.yaml")
    records = []
    for run in plan(grid).values():
        rates = [choice["lr"] for choice in grid.choices_of(run.method)]
        told: dict[str, Any] = {"seconds": 1.0, "versions": {}, "processor": "a processor"}
        if run.kind == "choose":
            accuracy = 0.9 if run.choice["lr"] == rates[1] else 0.1
            told["candidates"] = [{"setting": {}, "accuracy": accuracy, "loss": 1.0}]
            recipe = run.recipe(grid, {})
        else:
            recipe = run.recipe(grid, {"lr": rates[1]})
            luck = np.random.default_rng([run.seed, list(grid.tasks).index(run.task)]).random(1000)
            hits = luck < accuracies[run.method]
            test = {"images": 1000, "accuracy": {"value": float(hits.mean())}, "loss": 1.0}
            measured = {"trained": 10, "percent_of_backbone": 0.1, "train_images": 1000, "delta_bytes": 1, "test": test}
            told |= {"metrics": measured, "images": run.task, "by_image": np.packbits(hits).tobytes().hex()}
        records.append(Record(run.name, run.kind, digest(recipe), **told))
    assert grid.record is not None
    write_records(Path(grid.record), records)


def test_the_page_of_the_recipe_from_planted_records(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"gps": 0.8, "neuron-random": 0.7}
    _plant(tmp_path, "recipe-screen", {**base, "correlation": 0.9, "snr": 0.6, "probe": 0.8})
    _plant(tmp_path, "recipe-screen-vit", {**base, "correlation": 0.8})
    _plant(tmp_path, "recipe-confirm", {"gps": 0.8, "full": 0.9, "best": 0.85})
    (tmp_path / "recipe-page.yaml").write_text((STUDIES / "recipe-page.yaml").read_text())
    monkeypatch.setattr(page, "STUDIES", tmp_path)
    lines = page.recipe_search().splitlines()

    def line(beginning: str) -> list[str]:
        (one,) = [line for line in lines if line.startswith(f"| {beginning}")]
        return [cell.strip() for cell in one.strip("|").split("|")]

    def points(cell: str) -> float:
        return float(cell.split()[0])

    correlation = line("scores: correlation")
    for cell, expected in zip(correlation[1:5], (10, 20, 0, 10), strict=True):
        assert points(cell) == pytest.approx(expected, abs=1.5)
    assert correlation[5] == "better on EfficientNet-Lite0; not told apart on ViT-S/14"
    assert line("scores: signal to noise")[5] == "worse on EfficientNet-Lite0"
    assert line("scores: signal to noise")[3:5] == ["", ""]
    assert line("training starts from")[5] == "not told apart on EfficientNet-Lite0"
    assert line("drop path")[1:] == [""] * 5
    assert line("the recipe is better than GPS")[2].startswith("holds")
    assert line("the recipe is better than full fine-tuning |")[2].startswith("the contrary")
    assert line("the recipe is better than full fine-tuning under")[2] == "not measured yet"
    text = "\n".join(lines)
    for heading in ("## Candidates", "## The recipe", "## Confirmation", "## Screening on ViT-S/14"):
        assert heading in text
    for number in (2 * 5 * 6, 2 * 3 * 6, 4 * 3 * 11):
        assert f"{number} of the {number} runs of [recipe-" in text


def test_every_candidate_of_the_page_is_an_arm_or_still_to_come(page: ModuleType) -> None:
    words = yaml.safe_load((STUDIES / "recipe-page.yaml").read_text())
    named = {candidate["method"] for candidate in words["candidates"]}
    for name in SCREENS:
        assert set(read_grid(STUDIES / f"{name}.yaml").methods) <= named | {"gps", "neuron-random", "linear"}
    assert "not measured yet" in page.recipe_search()


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


def test_in_short_sorts_methods_by_what_can_be_told(page: ModuleType) -> None:
    grid, cells = _cells(
        {"gps": [0.8, 0.8], "far": [0.9, 0.9], "near": [0.85, 0.85], "equal": [0.8, 0.8], "low": [0.6, 0.6]}
    )
    better, worse, equal = page.in_short(grid, cells, "gps")
    assert better.startswith("- better than gps: far +")
    assert better.index("far") < better.index("near")
    assert worse.startswith("- worse than gps: low -")
    assert equal.startswith("- not told apart from gps: equal ")
    assert next(page.in_short(*_cells({"gps": [0.8]}), "gps")) == "- better than gps: none"
