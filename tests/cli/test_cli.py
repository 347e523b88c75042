"""Every command in a process of its own, once."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import fewtune as library
from runs import SETTINGS, arguments, coloured_folder, fewtune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def task(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task file of `fewtune fit`."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = fewtune("fit", *arguments(images, epochs=2, lr=5e-3), "--out", out)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "validation accuracy" in done.stderr  # progress, a line an epoch
    return out / "delta.safetensors"


def _ok(*command: str | Path) -> str:
    done = fewtune(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_select_saves_a_selection_and_says_where_it_lies(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "chosen" / "selection.safetensors"
    told = _ok("select", *arguments(images, k=2), "--out", out)
    assert "blocks.0.attn.qkv.weight" in told
    assert library.Selection.load(out).connections == 2 * 3136


def test_evaluate(task: Path, images: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "predictions.csv"
    told = _ok(
        "evaluate", "--delta", task, "--data", images, "--test-fraction", "0.25", "--predictions", predictions, "--json"
    )
    got = json.loads(told)
    assert got == json.loads((task.parent / "metrics.json").read_text())["test"]
    assert predictions.read_bytes() == (task.parent / "test_predictions.csv").read_bytes()
    compared = _ok("evaluate", "--compare", predictions, predictions)
    assert "0.0 [0.0, 0.0] points" in compared


def test_predict(task: Path, images: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(_ok("predict", "--delta", task, images / "class2"))))
    assert [Path(row["file"]).name for row in rows] == [f"{i:02d}.png" for i in range(12)]
    assert set(rows[0]) == {"file", "prediction", "probability", "p(class0)", "p(class1)", "p(class2)"}


def test_export_loads_strictly_into_timm_and_there_and_back_is_exact(task: Path, images: Path, tmp_path: Path) -> None:
    merged, plain, again = (tmp_path / f"{name}.safetensors" for name in ("merged", "plain", "again"))
    _ok("delta", "export", task, "--out", merged)
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    model.load_state_dict(load_file(merged), strict=True)
    by_command = json.loads(_ok("predict", "--delta", task, images, "--json"))
    assert len(by_command) == 36
    _ok("delta", "revert", task, merged, "--out", plain)
    _ok("delta", "apply", task, plain, "--out", again)
    assert again.read_bytes() == merged.read_bytes()
    before, after = load_file(plain), load_file(merged)
    selected = library.load_delta(task).selection()
    for name, places in selected.places.items():
        changed = int((before[name] != after[name]).sum())
        assert 0 < changed <= places.flat.numel()
    untouched = [n for n in after if n not in {*selected.places, *selected.whole, *selected.head}]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def test_inspect_and_diff(task: Path) -> None:
    told = _ok("delta", "inspect", task)
    assert f"{SETTINGS['model']} at 32 px" in told
    assert "class0, class1, class2" in told
    got = json.loads(_ok("delta", "diff", task, task, "--json"))
    assert got["same"] is True
    assert all(row["first"] == row["both"] and row["largest difference"] == 0 for row in got["tensors"])
