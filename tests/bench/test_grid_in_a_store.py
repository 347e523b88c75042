"""A grid in an object store: the folders of a local one, sent when a run has ended, and copied from anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from fewtune.bench.foreman import run_grid
from fewtune.bench.grid import Grid, grid_from, write_grid
from fewtune.bench.job import Job, do
from fewtune.cli import main
from fewtune.errors import ConfigError
from fewtune.files import read_json
from fewtune.training.mirror import UNSENT, Mirror
from runs import SETTINGS, coloured_folder, tiny_recipe

RESULTS = ("metrics.json", "validation.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images", each=8)


def small_grid(images: Path) -> Grid:
    return grid_from(
        {
            "settings": {**SETTINGS, "epochs": 1},
            "tasks": {"colours": {"data": str(images)}},
            "methods": {"gps": {"method": "gps", "choices": {"lr": [1e-3, 1e-2]}}},
            "seeds": [0],
            "choose_epochs": False,
        }
    )


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def another_machine(tmp_path: Path) -> None:
    """Forget the local folder."""
    shutil.rmtree(tmp_path / "cache/mirrors")


def test_a_grid_in_a_store_is_the_local_one(images: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    grid, store, out = small_grid(images), tmp_path / "store/grid", f"file://{tmp_path}/store/grid"
    run_grid(grid, tmp_path / "local")
    progress = run_grid(grid, out)
    assert (len(progress.done), progress.failed) == (3, {})
    unsent = {".lock", "tensorboard"}
    assert {name for name in written(tmp_path / "local") if not unsent & set(Path(name).parts)} == {
        name for name in written(store) if not unsent & set(Path(name).parts)
    }
    same = "colours/gps/seed-0/delta.safetensors"
    assert (store / same).read_bytes() == (tmp_path / "local" / same).read_bytes()
    before = {name: (store / name).read_bytes() for name in written(store) if name.endswith(RESULTS)}

    another_machine(tmp_path)
    file = tmp_path / "grid.yaml"
    file.write_text(write_grid(grid))
    for command, expected in (
        (["status"], "3 done, 0 failed, 0 left"),
        (["table"], "colours"),
        (["selections"], "Overlap"),
    ):
        monkeypatch.setattr("sys.argv", ["fewtune", "bench", *command, str(file), "--out", out])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out

    another_machine(tmp_path)
    shutil.rmtree(store / "colours/gps/choose/lr=0.001")  # done again, and nothing else
    again = run_grid(grid, out)
    assert (len(again.done), again.failed) == (3, {})
    after = {name: (store / name).read_bytes() for name in before}
    assert [name for name in before if before[name] != after[name]] == [
        "colours/gps/choose/lr=0.001/seed-0/validation.json"
    ]

    other = grid_from({**yaml.safe_load(write_grid(grid)), "settings": {**SETTINGS, "epochs": 2}})
    refused = run_grid(other, out)
    assert len(refused.failed) == 3
    assert f"{out}/colours/gps/choose/lr=0.001/seed-0 was begun with other settings" in str(refused.failed)


def test_a_run_that_was_not_sent_whole_counts_as_not_done(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    mirror = Mirror.of("memory://bucket/cut")
    job = Job(
        "train", "colours/bias/seed-0", tiny_recipe(images, method="bias", epochs=1), mirror.local, "last", mirror
    )
    send_file, sent = Mirror.send_file, []

    def failing(self: Mirror, path: Path) -> None:
        if path.name == "metrics.json" and not sent:
            sent.append(path)
            raise ConfigError("the network is down")
        send_file(self, path)

    monkeypatch.setattr(Mirror, "send_file", failing)
    assert do(job) == "the network is down"
    memory = fsspec.filesystem("memory")
    assert memory.exists("/bucket/cut/colours/bias/seed-0/delta.safetensors")
    assert not memory.exists("/bucket/cut/colours/bias/seed-0/metrics.json")
    trained = job.result.read_bytes()
    mirror.pull()
    assert (job.folder / UNSENT).exists()
    mirror.send_unsent(RESULTS)  # it is sent, not trained again
    assert memory.cat("/bucket/cut/colours/bias/seed-0/metrics.json") == trained
    assert not (job.folder / UNSENT).exists()
    memory.rm("/bucket/cut/colours/bias/seed-0", recursive=True)  # a user's way to have it made anew
    mirror.pull()
    assert not job.result.exists()
    assert do(job) is None
    assert read_json(job.result)["seconds"] != 0
    assert memory.cat("/bucket/cut/colours/bias/seed-0/metrics.json") == job.result.read_bytes()


def test_copies_follow_the_store(tmp_path: Path) -> None:
    memory, mirror = fsspec.filesystem("memory"), Mirror.of("memory://bucket/copies")
    memory.pipe({"/bucket/copies/a/metrics.json": b"1", "/bucket/copies/a/delta.safetensors": b"large"})
    mirror.pull()
    assert (mirror.local / "a/metrics.json").read_text() == "1"
    assert not (mirror.local / "a/delta.safetensors").exists()
    memory.pipe("/bucket/copies/a/metrics.json", b"2")
    mirror.pull()
    assert (mirror.local / "a/metrics.json").read_text() == "2"
    mirror.begin(mirror.local / "b")
    (mirror.local / "b/failed.txt").write_text("no")
    memory.pipe("/bucket/copies/b/metrics.json", b"of another machine")
    mirror.pull()  # what is worked on here is left alone
    assert written(mirror.local / "b") == {UNSENT, "failed.txt"}
    mirror.send(mirror.local / "b", "failed.txt")
    assert sorted(memory.find("/bucket/copies/b")) == ["/bucket/copies/b/failed.txt"]
    memory.rm("/bucket/copies/a", recursive=True)
    mirror.pull()
    assert not (mirror.local / "a/metrics.json").exists()
    with pytest.raises(ConfigError, match="Protocol not known: s9"):
        Mirror.of("s9://bucket").pull()
