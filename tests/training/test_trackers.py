"""`tracker=`: what a run tells Weights & Biases, MLflow and Trackio, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewtune.errors import MissingExtra
from fewtune.files import read_json
from fewtune.tasks import fit
from fewtune.training.trackers import results
from runs import arguments, coloured_folder, fewtune, tiny_recipe
from stopping import Stop


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("trackers") / "images", each=8)


def _interrupted_run(images: Path, out: Path, tracker: str) -> dict[str, Any]:
    """Of three epochs the first, then the others by --resume."""
    recipe = tiny_recipe(images, epochs=3, warmup_epochs=0, importance="magnitude", tracker=tracker)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, out, callbacks=[Stop(1)])
    begun = read_json(out / "tracker.json")
    fit(recipe, out, resume=True)
    assert read_json(out / "tracker.json") == begun
    return read_json(out / "metrics.json")


def test_none_by_default(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, epochs=1, warmup_epochs=0, importance="magnitude")
    assert recipe.tracker == "none"
    assert not fit(recipe, tmp_path / "run").folder.tracker.exists()


def test_one_that_is_not_installed_is_named_before_any_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fewtune\[wandb\]'"):
        fit(tiny_recipe(images, tracker="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mlflow(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs fewtune[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    metrics = _interrupted_run(images, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'fewtune'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == read_json(tmp_path / "run" / "tracker.json")["run"]
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "gps"
    assert run.data.metrics["test_accuracy"] == metrics["test"]["accuracy"]["value"]
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 3


def test_wandb(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs fewtune[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _interrupted_run(images, tmp_path / "run", "wandb")
    wandb.teardown()  # waits until all is written
    assert wandb.run is None  # ended: another run in this process begins its own
    name = read_json(tmp_path / "run" / "tracker.json")["run"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for word in (b"train_loss", b"val_accuracy", b"test_accuracy", b"magnitude"):
        assert word in content


READ = """
import sys
from trackio.sqlite_storage import SQLiteStorage
print([sorted(entry) for entry in SQLiteStorage.get_logs("fewtune", sys.argv[1])])
"""


def test_trackio(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="needs fewtune[trackio]")
    settings = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store")}  # read when it is imported
    given = arguments(images, epochs=2, warmup_epochs=0, importance="magnitude", tracker="trackio", report="false")
    done = fewtune("fit", *given, "--out", tmp_path / "run", "--json", env=settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["accuracy"]
    name = read_json(tmp_path / "run" / "tracker.json")["run"]
    read = subprocess.run([sys.executable, "-c", READ, name], env=settings, capture_output=True, text=True, check=True)
    assert read.stdout.count("train_loss") == 2
    assert read.stdout.count("test_accuracy") == 1


def test_what_is_told_at_the_end() -> None:
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    got = results({"seconds": 3, "method": "gps", "test": {"images": 9, "accuracy": interval, "confusion": [[1]]}})
    assert got == {"test_accuracy": 0.5, "seconds": 3.0}
