"""All tasks of a folder on all images, from Python and the shell."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from banks import task
from fewtune.cli.app import app
from fewtune.errors import DataError
from fewtune.models import load_backbone
from fewtune.serving.opening import open_bank
from fewtune.serving.predicting import predict_tasks
from services import CLASSES, backbone, expected, opened, picture, task_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (folder := tmp_path / "images").mkdir()
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(picture(seed))
    return folder


def test_every_image_gets_every_tasks_answer(tmp_path: Path, images: Path) -> None:
    own = opened(tmp_path / "tasks")
    rows = predict_tasks(tmp_path / "tasks", [images], batch_size=4, accelerator="cpu")
    assert [(Path(row["file"]).name, row["task"]) for row in rows] == [
        (f"{i}.jpg", name) for i in range(3) for name in sorted(CLASSES)
    ]
    for row in rows:
        wanted = expected(own, row["task"], Path(row["file"]).read_bytes())
        assert row["probabilities"] == pytest.approx(wanted, abs=1e-4)
        assert row["prediction"] == max(wanted, key=wanted.__getitem__)


def test_one_bad_image_loses_no_other(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = task_folder(tmp_path / "tasks")
    good = predict_tasks(folder, [images], accelerator="cpu")
    (images / "1-bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="1-bad"):
        predict_tasks(folder, [images], accelerator="cpu")
    rows = predict_tasks(folder, [images], accelerator="cpu", strict=False)
    assert [row for row in rows if not row["error"]] == [{**row, "error": None} for row in good]
    assert [Path(row["file"]).name for row in rows if row["error"]] == ["1-bad.jpg"]
    assert app(["predict", "--tasks", str(folder), str(images)], standalone_mode=False) == 1
    assert "1-bad.jpg" in capsys.readouterr().out


def test_tasks_may_see_images_at_other_sizes(tmp_path: Path, images: Path) -> None:
    (folder := tmp_path / "tasks").mkdir()
    own = load_backbone("timm:test_efficientnet", num_classes=4, image_size=32, pretrained=False)
    for seed, (name, size) in enumerate({"small": 32, "large": 48}.items()):
        described = {**own.describe(), "image_size": size}
        metadata = {"backbone": described, "class_names": ["a", "b", "c"], "transform": "plain"}
        replace(task(own.model, seed=seed), metadata=metadata).save(folder / f"{name}.safetensors")
    rows = predict_tasks(folder, [images], accelerator="cpu")
    assert len(rows) == 6


def test_from_the_shell(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "--tasks", str(task_folder(tmp_path / "tasks")), str(images)]
    app(command, standalone_mode=False)
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    app([*command, "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    assert [(r["file"], r["task"], r["prediction"]) for r in table] == [
        (r["file"], r["task"], r["prediction"]) for r in rows
    ]
    assert len(rows) == 9


def test_what_is_wrong_is_told(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match="no folder of task files"):
        predict_tasks(tmp_path / "none", [images])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no task file that names its backbone"):
        open_bank(tmp_path / "empty")
    (tmp_path / "empty" / "a.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="not a delta file"):
        open_bank(tmp_path / "empty")
    (other := backbone()).model.get_parameter("blocks.0.mlp.fc1.weight").data.mul_(1.1)
    metadata = {"backbone": other.describe(), "class_names": ["a", "b", "c"]}
    replace(task(other.model), metadata=metadata).save(tmp_path / "empty" / "b.safetensors")
    with pytest.raises(DataError, match="holds no task of this backbone"):
        predict_tasks(tmp_path / "empty", [images])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either --delta FILE or --tasks FOLDER"),
        (["--delta", "birds.safetensors", "--backbone", "timm:vit"], "--backbone goes with --tasks"),
        (["--tasks", "tasks", "--workers", "2"], "--workers goes with --delta"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        app(["predict", "photos", *options], standalone_mode=False)
