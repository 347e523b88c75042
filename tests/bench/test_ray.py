"""A grid on a Ray cluster of two nodes of this machine, one of which is lost in the middle."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters import ray_nodes
from fewtune.bench.executors import executor
from fewtune.bench.foreman import run_grid
from fewtune.bench.grid import Grid, grid_from
from fewtune.bench.results import record_all
from fewtune.errors import ConfigError, MissingExtra
from runs import SETTINGS, coloured_folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Sixteen runs: two learning rates tried by two methods, and six seeds of each with the better one."""
    images = coloured_folder(tmp_path_factory.mktemp("data") / "images", each=8)
    methods = {name: {"method": name, "choices": {"lr": [1e-3, 1e-2]}} for name in ("gps", "bias")}
    return grid_from(
        {
            "settings": {**SETTINGS, "epochs": 1},
            "tasks": {"colours": {"data": str(images)}},
            "methods": methods,
            "seeds": list(range(6)),
            "choose_epochs": False,
        }
    )


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU each."""
    with ray_nodes(2) as started:
        yield started


def results(out: Path) -> dict[str, Any]:
    """What a grid gave, without times."""
    files: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("delta.safetensors")}
    files |= {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("test_predictions.csv")}
    for path in out.rglob("validation.json"):
        files[str(path.relative_to(out))] = json.loads(path.read_text())["candidates"]
    return files


@pytest.mark.slow
def test_a_lost_node_costs_no_run_and_changes_no_number(grid: Grid, cluster: Any, tmp_path: Path) -> None:
    def ended() -> int:
        return sum(1 for name in ("metrics.json", "validation.json") for _ in (tmp_path / "ray").rglob(name))

    def lose_a_node() -> None:
        while ended() < 5:
            time.sleep(0.5)
        seen.append(ended())
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    seen: list[int] = []
    watching = threading.Thread(target=lose_a_node, daemon=True)
    watching.start()
    progress = run_grid(grid, tmp_path / "ray", on="ray")
    watching.join()
    assert 5 <= seen[0] < 16
    assert len(cluster.worker_nodes) == 0
    assert (len(progress.done), progress.failed, progress.waiting) == (16, {}, [])
    names = [record.name for record in record_all(grid, tmp_path / "ray")]
    assert len(names) == len(set(names)) == 16

    run_grid(grid, tmp_path / "local")
    assert results(tmp_path / "ray") == results(tmp_path / "local")
    assert len(results(tmp_path / "ray")) == 28  # 12 task files, 12 lists of predictions, 4 choices

    broken = tmp_path / "ray/colours/bias/seed-3"
    shutil.rmtree(broken)
    again = run_grid(grid, tmp_path / "ray", on="ray")  # what is done is skipped
    assert (len(again.done), again.failed) == (16, {})
    assert results(tmp_path / "ray") == results(tmp_path / "local")


def test_what_a_grid_needs_is_told(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"local, ray or ray://HOST:PORT, got 'slurm'"):
        executor("slurm", grid)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"fewtune\[ray\]"):
        executor("ray", grid)
