"""The grid's file, its plan, and how a choice is made: nothing is trained here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewtune.bench.grid import Grid, grid_from, read_grid, write_grid
from fewtune.bench.ledger import Ledger
from fewtune.bench.plan import plan, scores_file
from fewtune.errors import ConfigError


def values(**changes: Any) -> dict[str, Any]:
    """A good grid."""
    return {
        "settings": {"model": "timm:test_vit", "epochs": 4},
        "tasks": {"one": {"data": "a", "title": "the first"}, "two": {"data": "b", "batch_size": 8}},
        "methods": {
            "gps": {"method": "gps", "k": 1, "choices": {"lr": [1e-3, 1e-2], "k": [1, 2]}},
            "linear": {"method": "linear", "choices": {}},
        },
        "seeds": [3, 4],
        **changes,
    }


def refused(given: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        grid_from(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_mistakes_at_once() -> None:
    told = refused(
        {
            "settings": {"model": "timm:test_vit", "epocs": 4, "lr": "fast"},
            "tasks": {"one": {"data": "a"}, "a b": {"data": "b"}},
            "methods": {"gps": {"metod": "gps", "choices": {"learning": [1]}}, "x": {"method": "gpss"}},
            "seeds": [1, 1],
            "worker": 2,
        }
    )
    for part in (
        "unknown key 'settings.epocs' (did you mean 'epochs'?)",
        "unknown key 'methods.gps.metod' (did you mean 'method'?)",
        "unknown key 'methods.gps.choices.learning'",
        "unknown key 'worker' (did you mean 'workers'?)",
        "tasks.a b",
    ):
        assert part in told, told


def test_values_are_checked_for_every_run() -> None:
    told = refused(values(settings={"model": "timm:test_vit", "lr": "fast", "epocs": 3}))
    assert "unknown key 'settings.epocs'" in told
    assert "lr: " in told
    assert told.count("lr: ") == 1
    assert "method: " in refused(values(methods={"x": {"method": "gpss"}}))
    assert "'data' is missing" in refused(values(tasks={"one": {"title": "no data"}}))
    assert "less than one connection" in refused(values(methods={"g": {"method": "gps", "choices": {"k": [0.5]}}}))
    assert "the bench sets it itself" in refused(values(settings={"model": "m", "seed": 1}))
    assert "no method is called 'lora'" in refused(values(compare="lora"))
    assert "every seed may stand there once" in refused(values(seeds=[1, 1]))
    assert "choose_epochs=false" in refused(values(choose={"epochs": 2}))
    assert "no recipe" in refused(values(tasks={"one": {"recipe": "vtab/cifarr", "root": "r"}}))


def test_a_seed_is_run_on_all_tasks_before_the_next_and_later_methods_wait_for_all() -> None:
    methods = {"few": {"method": "bias", "seeds": [4]}, "gps": {"method": "gps"}}
    grid = grid_from(values(methods=methods, later=["few"], choose_epochs=False))
    assert list(plan(grid)) == [
        "one/gps/seed-3", "two/gps/seed-3", "one/gps/seed-4", "two/gps/seed-4", "one/few/seed-4", "two/few/seed-4",
    ]  # fmt: skip
    assert "later: no method is called 'lora'" in refused(values(later=["lora"]))
    assert "methods.few.seeds" in refused(values(methods={"few": {"method": "bias", "seeds": [1, 1]}}))


def test_the_best_epoch_or_the_last() -> None:
    """A study may keep the best epoch; then no run trains on the validation images."""
    best = grid_from(values(protocol="best", choose_epochs=False))
    last = grid_from(values(choose_epochs=False))
    assert [grid.judged for grid in (best, last, grid_from(values()))] == ["best", "last", "all"]
    for grid, train_on in ((best, "train"), (last, "train+val")):
        assert {run.recipe(grid, {}).train_on for run in plan(grid).values() if run.kind == "train"} == {train_on}
    assert "add choose_epochs=false" in refused(values(protocol="best"))


def test_files_overrides_and_back(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(values()))
    grid = read_grid(file, ["workers=2", "tasks.one.data=elsewhere", "seeds=[7]"])
    assert (grid.workers, grid.seeds, grid.tasks["one"].settings["data"]) == (2, (7,), "elsewhere")
    file.write_text(write_grid(grid))
    assert read_grid(file) == grid
    with pytest.raises(ConfigError, match="expected key=value"):
        read_grid(file, ["workers"])
    with pytest.raises(ConfigError, match="no configuration file"):
        read_grid(tmp_path / "none.yaml")


def test_the_settings_nearest_to_the_run_win() -> None:
    grid = grid_from(
        values(
            tasks={"cifar": {"recipe": "vtab/cifar", "root": "data", "batch_size": 8}},
            methods={"full": {"method": "full", "epochs": 7, "choices": {"lr": [0.5]}}},
        )
    )
    recipe = grid.recipe("cifar", "full", {"lr": 0.5}, 3)
    assert (recipe.model, recipe.epochs, recipe.lr, recipe.batch_size) == ("timm:test_vit", 7, 0.5, 8)
    assert recipe.data == "task:vtab-cifar?root=data"
    assert recipe.optimizer == "adamw"  # of recipes/peers/full.yaml, which comes with the recipe by name


def test_plan() -> None:
    runs = plan(grid_from(values()))
    kinds = [run.kind for run in runs.values()]
    # a task: 4 choices of gps and the probe's regularisation with one seed; 2 methods with 2 seeds
    assert (kinds.count("choose"), kinds.count("train")) == (2 * 5, 2 * 4)
    assert len(runs["two/gps/seed-4"].needs) == 4
    tried = runs["one/gps/choose/lr=0.001,k=2/seed-3"]
    assert tried.choice == {"lr": 1e-3, "k": 2}
    grid = grid_from(values())
    assert tried.recipe(grid, {}).train_on == "train"
    final = runs["two/gps/seed-4"].recipe(grid, {"lr": 0.5, "k": 2, "stop_after": 3})
    assert (final.train_on, final.lr, final.k, final.stop_after, final.seed) == ("train+val", 0.5, 2, 3, 4)
    fixed = grid_from(values(choose_epochs=False, methods={"b": {"method": "bias"}}))
    assert {run.kind for run in plan(fixed).values()} == {"train"}
    assert plan(fixed)["one/b/seed-3"].needs == ()


def test_scores_are_shared_by_the_choices_of_a_seed_and_by_nothing_else(tmp_path: Path) -> None:
    grid = grid_from(values())
    first = grid.recipe("one", "gps", {"lr": 1e-3, "k": 1}, 3)
    file = scores_file(first, tmp_path)
    assert file is not None
    assert scores_file(first.changed(lr=0.5, k=7, granularity="layer", epochs=9, stop_after=2), tmp_path) == file
    for change in ({"seed": 4}, {"train_on": "train+val"}, {"data": "b"}, {"objective": "cross_entropy"},
                   {"batch_size": 9}, {"model": "timm:test_vit2"}, {"limit_train": 9}):  # fmt: skip
        assert scores_file(first.changed(**change), tmp_path) not in (file, None), change
    assert scores_file(first.changed(importance="random"), tmp_path) is None
    assert scores_file(first.changed(method="bias"), tmp_path) is None


def judged(grid: Grid, out: Path, accuracies: dict[str, list[list[float]]]) -> list[Any]:
    """Choosing runs of gps on task one with these accuracies: choice -> seeds -> epochs."""
    runs = [run for run in plan(grid).values() if run.kind == "choose" and (run.task, run.method) == ("one", "gps")]
    for run in runs:
        epochs = accuracies[f"lr={run.choice['lr']}"][grid.choosing_seeds.index(run.seed)]
        candidates = [
            {"setting": {"stop_after": i}, "accuracy": value, "loss": 1 - value} for i, value in enumerate(epochs, 1)
        ]
        run.result(out).parent.mkdir(parents=True)
        run.result(out).write_text(json.dumps({"candidates": candidates}))
    return runs


def test_the_best_choice_and_its_epoch_by_the_mean_over_seeds(tmp_path: Path) -> None:
    grid = grid_from(
        values(methods={"gps": {"method": "gps", "choices": {"lr": [0.1, 0.2, 0.3]}}}, choose_seeds=[3, 4])
    )
    given = {"lr=0.1": [[0.1, 0.9], [0.1, 0.1]], "lr=0.2": [[0.5, 0.6], [0.7, 0.8]], "lr=0.3": [[0.99, 0.99], []]}
    best, rows = Ledger(grid, tmp_path).best(judged(grid, tmp_path, given))
    assert best == {"lr": 0.2, "stop_after": 2}
    by_choice = {(row["lr"], row.get("stop_after")): row for row in rows}
    assert by_choice[0.2, 2]["accuracy"] == pytest.approx(0.7)
    assert by_choice[0.3, 1]["accuracy"] == pytest.approx(0.99 / 2)  # the other seed diverged
    assert by_choice[0.3, 1]["loss"] == math.inf


def test_of_equal_choices_the_lower_loss_then_the_first(tmp_path: Path) -> None:
    grid = grid_from(values(methods={"gps": {"method": "gps", "choices": {"lr": [0.1, 0.2, 0.3]}}}))
    runs = judged(grid, tmp_path, {"lr=0.1": [[0.5]], "lr=0.2": [[0.5]], "lr=0.3": [[0.5]]})
    for run, loss in zip(runs, (2.0, 1.0, 1.0), strict=True):
        run.result(tmp_path).write_text(json.dumps({"candidates": [{"setting": {}, "accuracy": 0.5, "loss": loss}]}))
    assert Ledger(grid, tmp_path).best(runs)[0] == {"lr": 0.2}
