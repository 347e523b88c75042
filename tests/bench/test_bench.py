"""Grids of tiny models: killed and gone on with, with runs that fail, and the tables made from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from fewtune import load_delta, magnitude_importance
from fewtune.analysis import rank_correlation
from fewtune.bench.executors.local import LocalExecutor
from fewtune.bench.foreman import run_grid, status
from fewtune.bench.grid import Grid, grid_from, read_grid
from fewtune.bench.job import Job
from fewtune.bench.plan import plan
from fewtune.bench.report import grid_tables
from fewtune.bench.results import collect, difference, record_all
from fewtune.bench.selections import agreement, overlaps
from fewtune.config import read_recipe
from fewtune.errors import ConfigError
from fewtune.importance import Scores
from fewtune.selection import Selection
from fewtune.tasks import prepare
from runs import coloured_folder, fewtune, tiny_recipe

SETTINGS: dict[str, Any] = {
    "model": "timm:test_vit", "pretrained": False, "image_size": 32, "test_fraction": 0.25, "epochs": 3,
    "batch_size": 8, "accelerator": "cpu",
}  # fmt: skip


def values(first: Path, second: Path, **changes: Any) -> dict[str, Any]:
    """Two methods, two tasks, two seeds, two learning rates."""
    return {
        "settings": SETTINGS,
        "tasks": {"red": {"data": str(first), "title": "red things"}, "blue": {"data": str(second)}},
        "methods": {
            "gps": {"method": "gps", "choices": {"lr": [1e-3, 1e-2]}},
            "linear": {"method": "linear", "choices": {}},
        },
        "seeds": [0, 1],
        "workers": 2,
        **changes,
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("data")
    return coloured_folder(root / "red"), coloured_folder(root / "blue", classes=2, each=16)


@pytest.fixture(scope="module")
def whole(images: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, Path]:
    """The grid, done without interruption."""
    grid, out = grid_from(values(*images)), tmp_path_factory.mktemp("grid") / "whole"
    progress = run_grid(grid, out)
    assert not progress.failed
    assert len(progress.done) == 2 * (2 + 1) + 2 * 2 * 2  # choosing with one seed; two methods, tasks and seeds
    return grid, out


def _children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.02)


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found through /proc")
def test_a_killed_grid_goes_on_and_ends_as_an_uninterrupted_one(
    images: tuple[Path, Path], whole: tuple[Grid, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "grid.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(values(*images)))
    names = [name for name, run in plan(whole[0]).items() if run.kind == "train"]

    def finished() -> list[str]:
        return [name for name in names if (out / name / "metrics.json").exists()]

    command = [sys.executable, "-m", "fewtune", "bench", "run", str(file), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        _wait(lambda: len(finished()) >= 2 or process.poll() is not None, 120)
        workers = _children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)  # nobody writes on
    done = finished()
    assert 2 <= len(done) < len(names), "killed too late to mean anything"
    before = {name: _state(out / name) for name in done}

    again = fewtune("bench", "run", file, "--out", out, "--json")
    assert again.returncode == 0, again.stderr
    assert set(json.loads(again.stdout)["done"]) == set(plan(whole[0]))
    for name in done:
        assert _state(out / name) == before[name]
    for name in names:
        for kept in ("delta.safetensors", "test_predictions.csv", "config.yaml"):
            assert (out / name / kept).read_bytes() == (whole[1] / name / kept).read_bytes(), f"{name}/{kept}"
    for method in ("gps", "linear"):
        chosen = [json.loads((folder / f"red/{method}/chosen.json").read_text()) for folder in (out, whole[1])]
        assert chosen[0] == chosen[1]


@pytest.mark.slow
def test_the_protocol_of_every_run(whole: tuple[Grid, Path]) -> None:
    """Choices on validation images only; then all images but the test's, the chosen settings, the last epoch."""
    grid, out = whole
    for name, run in plan(grid).items():
        held = {path.name for path in (out / name).iterdir()}
        recipe = read_recipe([out / name / "config.yaml"])
        assert "checkpoint.ckpt" not in held
        if run.kind == "choose":
            assert not {"metrics.json", "test_predictions.csv", "delta.safetensors"} & held
            assert recipe.train_on == "train"
            continue
        chosen = json.loads((out / run.task / run.method / "chosen.json").read_text())["chosen"]
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert recipe.train_on == "train+val"
        assert {key: getattr(recipe, key) for key in chosen} == chosen
        # 36 or 32 images, a quarter for the test, nothing for validation
        assert metrics["train_images"] == {"red": 27, "blue": 24}[run.task]
        if run.method == "gps":
            assert set(chosen) == {"lr", "stop_after"}
            history = json.loads((out / name / "history.json").read_text())
            assert len(history) == chosen["stop_after"]
            assert metrics["validation"] == {"epoch": chosen["stop_after"] - 1}
            assert "val_loss" not in history[0]
        else:
            assert metrics["validation"] == {"regularisation": chosen["regularisation"]}
    assert not list(out.glob("*/scores")), "scores are as large as a model, and go when nothing needs them"


@pytest.mark.slow
def test_scores_are_taken_once_for_all_choices_of_a_seed(whole: tuple[Grid, Path]) -> None:
    _, out = whole
    seconds = [
        json.loads((out / f"red/gps/choose/lr={lr}/seed-0/importance.json").read_text())["seconds"]
        for lr in (0.001, 0.01)
    ]
    assert seconds[0] == seconds[1]  # the very same pass
    other = json.loads((out / "red/gps/seed-1/importance.json").read_text())["seconds"]
    assert other != seconds[0]


@pytest.mark.slow
def test_results_and_tables(whole: tuple[Grid, Path]) -> None:
    grid, out = whole
    cells = collect(grid, out)
    gps, linear = cells["red", "gps"], cells["red", "linear"]
    metrics = [json.loads((out / f"red/gps/seed-{seed}/metrics.json").read_text()) for seed in (0, 1)]
    accuracies = [m["test"]["accuracy"]["value"] for m in metrics]
    assert gps.values == tuple(accuracies)
    assert gps.mean == pytest.approx(sum(accuracies) / 2)
    assert gps.deviation == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    between = difference(linear, gps)
    assert linear.mean is not None
    assert between is not None
    assert between.value == pytest.approx(gps.mean - linear.mean)
    assert between.low <= between.value <= between.high
    assert gps.step_seconds is not None
    assert linear.step_seconds is None
    red, blue, every, minus = grid_tables(grid, out)
    assert red.title == "red things"
    row = dict(zip(red.columns, red.rows[0], strict=True))
    assert row["trained"] == f"{metrics[0]['trained']:,}"
    assert row["test accuracy, mean ± sd (seeds)"].endswith("(2)")
    assert row["minus gps (95 % interval)"] == ""
    assert float(red.rows[1][3].split(" ")[0]) == pytest.approx(-100 * between.value, abs=0.051)
    assert every.rows[0][0] == "gps"
    assert [len(table.rows) for table in (red, blue, every, minus)] == [2, 2, 2, 1]
    assert float(minus.rows[0][1].split(" ")[0]) == pytest.approx(-100 * between.value, abs=0.051)


@pytest.mark.slow
def test_a_record_stands_for_the_folders(images: tuple[Path, Path], whole: tuple[Grid, Path], tmp_path: Path) -> None:
    """From one small file all runs count as done, elsewhere too, and the tables are the same to the letter."""
    _, out = whole
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(values(*images, record="records/tiny.jsonl")))
    done = fewtune("bench", "record", grid, "--out", out)
    assert done.returncode == 0, done.stderr
    read = read_grid(grid)
    assert status(read, tmp_path / "nothing").done == list(plan(read))
    assert grid_tables(read, tmp_path / "nothing") == grid_tables(read, out)
    assert not run_grid(read, tmp_path / "nothing").waiting
    assert not list((tmp_path / "nothing").rglob("metrics.json"))
    assert record_all(read, tmp_path / "nothing") == record_all(read, out)
    changed = read.model_copy(update={"settings": {**SETTINGS, "weight_decay": 0.5}})
    assert not status(changed, tmp_path / "nothing").done
    elsewhere = read_grid(grid, [f"tasks.red.data=/another/place/{images[0].name}"])
    assert len(status(elsewhere, tmp_path / "nothing").done) == len(plan(read))

    other = tmp_path / "other.yaml"
    methods = {"gps": {"method": "gps", "choices": {"lr": [1e-3, 1e-2]}}, "linear": {"method": "bias", "choices": {}}}
    other.write_text(yaml.safe_dump(values(*images, methods=methods, borrow=["records/tiny.jsonl"])))
    borrowing = read_grid(other)
    borrowed = [record for record in record_all(read, out) if "/gps/" in record.name]
    assert record_all(borrowing, tmp_path / "nothing") == borrowed  # what goes by the name of linear is another method


@pytest.mark.slow
def test_selections_overlap_over_seeds_and_tasks(whole: tuple[Grid, Path]) -> None:
    table = overlaps(*whole)
    pairs = {(row[0], row[1], row[2]): float(row[3]) for row in table.rows}
    assert set(pairs) == {
        ("seed", "red/gps/0", "red/gps/1"), ("seed", "blue/gps/0", "blue/gps/1"), ("task", "red/gps/0", "blue/gps/0"),
    }  # fmt: skip
    saved = [Selection.load(whole[1] / f"red/gps/seed-{seed}/selection.safetensors") for seed in (0, 1)]
    assert pairs["seed", "red/gps/0", "red/gps/1"] == pytest.approx(saved[0].overlap(saved[1]).shared, abs=5e-4)


@pytest.mark.slow
def test_criteria_beside_what_full_fine_tuning_moved(images: tuple[Path, Path], tmp_path: Path) -> None:
    methods = {"gps": {"method": "gps"}, "full": {"method": "full"}}
    tasks = {"red": {"data": str(images[0])}}
    grid = grid_from(values(*images, tasks=tasks, methods=methods, seeds=[0], choose_epochs=False, workers=1))
    assert not run_grid(grid, tmp_path).failed
    within = {row[1]: float(row[2]) for row in agreement(grid, tmp_path).rows}
    assert list(within) == ["gradient", "magnitude", "random"]
    assert abs(within["random"]) < 0.05
    work = prepare(grid.recipe("red", "gps", {}, 0, train_on="train+val"))
    model, head = work.backbone.model, work.backbone.head
    magnitudes = magnitude_importance(model, head=head)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    load_delta(tmp_path / "red/full/seed-0/delta.safetensors").apply(model)
    after = dict(model.named_parameters())
    moved = Scores({name: (after[name] - before[name]).detach().abs() for name in magnitudes}, magnitudes.anatomy)
    neurons = rank_correlation(magnitudes, moved).neurons.values()
    assert within["magnitude"] == pytest.approx(sum(neurons) / len(neurons), abs=6e-4)


@pytest.mark.slow
def test_done_runs_are_skipped_and_other_settings_are_refused(images: tuple[Path, Path], whole: Any) -> None:
    grid, out = whole
    assert not run_grid(grid, out).waiting
    assert status(grid, out).done == list(plan(grid))
    other = grid_from(values(*images, settings={**SETTINGS, "weight_decay": 0.5}))
    failed = run_grid(other, out).failed
    assert "was begun with other settings" in failed["red/gps/choose/lr=0.001/seed-0"]
    assert "weight_decay was 0.0 and is 0.5" in failed["red/gps/choose/lr=0.001/seed-0"]
    assert "nothing could be chosen" in failed["red/gps/seed-0"]
    assert status(grid, out).done == list(plan(grid))  # nothing was touched


@pytest.mark.slow
def test_failing_runs_are_told_and_the_others_go_on(images: tuple[Path, Path], tmp_path: Path) -> None:
    """A task whose images cannot be read, and a rate at which the loss becomes infinite."""
    broken = coloured_folder(tmp_path / "broken")
    (broken / "class1" / "03.png").write_text("not an image")
    methods = {"wild": {"method": "full", "lr": 1e30, "choices": {}}, "bias": {"method": "bias", "choices": {}}}
    given = values(images[0], broken, methods=methods, seeds=[0], compare="bias", workers=1)
    file, out = tmp_path / "grid.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(given))
    done = fewtune("bench", "run", file, "--out", out, "--json")
    assert done.returncode == 1, done.stderr
    got = json.loads(done.stdout)
    assert set(got["done"]) == {"red/wild/choose/only/seed-0", "red/bias/choose/only/seed-0", "red/bias/seed-0"}
    assert "the loss became" in got["failed"]["red/wild/seed-0"]
    assert "03.png" in got["failed"]["blue/bias/choose/only/seed-0"]
    assert "nothing could be chosen" in got["failed"]["blue/bias/seed-0"]
    lines = [line for line in done.stderr.splitlines() if "failed:" in line]
    assert len(lines) == len(got["failed"])
    assert "Traceback" not in done.stderr
    assert "Traceback" in (out / "red/wild/seed-0/failed.txt").read_text()
    table = fewtune("bench", "table", file, "--out", out)
    assert table.returncode == 0, table.stderr
    assert "| wild |" in table.stdout
    (broken / "class1" / "03.png").unlink()  # mended: failed runs are tried again
    again = fewtune("bench", "run", file, "--out", out, "--json")
    assert again.returncode == 1
    assert set(json.loads(again.stdout)["failed"]) == {"red/wild/seed-0", "blue/wild/seed-0"}


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_run_alone(images: tuple[Path, Path], tmp_path: Path) -> None:
    long = tiny_recipe(images[0], method="bias", epochs=5000, train_on="train+val")
    short = long.changed(epochs=1)
    jobs = [Job("train", "a/b/long", long, tmp_path, "all"), Job("train", "a/b/short", short, tmp_path, "all")]
    ended: dict[str, str | None] = {}
    with LocalExecutor(1, 1) as workers:

        def kill() -> None:
            _wait((jobs_folder / "history.json").exists, 60)
            os.kill(workers.workers[0].process.pid or 0, signal.SIGKILL)

        jobs_folder = jobs[0].folder
        threading.Thread(target=kill).start()
        workers.work_off(
            lambda running: jobs.pop(0) if jobs else None, lambda job, reason: ended.update({job.name: reason})
        )
    assert "ended by signal 9" in (ended["a/b/long"] or "")
    assert ended["a/b/short"] is None
    assert (tmp_path / "a/b/short/metrics.json").exists()


def test_folders_that_are_not_a_grids(images: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    grid = grid_from(values(*images))
    with pytest.raises(ConfigError, match="not the folder of a grid"):
        run_grid(grid, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "grid.yaml").write_text("")
    with FileLock(out / ".lock"), pytest.raises(ConfigError, match="another process is running"):
        run_grid(grid, out)
