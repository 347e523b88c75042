"""The demo's path, on a tiny random model and generated images in place of the fetched ones."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from fewtune import demo
from fewtune.cli import main
from runs import coloured_folder


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        coloured_folder(tmp_path / "images" / split)
    monkeypatch.setattr(demo, "MODEL", "timm:test_vit")
    monkeypatch.setattr(demo, "DATA", str(tmp_path / "images"))
    monkeypatch.setattr(
        demo, "SETTINGS", ("pretrained=false", "image_size=32", "epochs=1", "accelerator=cpu", "report=false")
    )
    monkeypatch.setattr(sys, "argv", ["fewtune", "demo", "--out", str(tmp_path / "demo"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got["methods"]) == ["linear", "random", "gps"]
    assert got["methods"]["linear"]["trained"] == 3 * 65
    accuracies = [got["methods"][method]["test"]["accuracy"]["value"] for method in ("linear", "gps")]
    assert got["gps minus linear"]["value"] == pytest.approx(accuracies[1] - accuracies[0])
    for index, (name, row) in enumerate(got["recall"].items()):
        for method in got["methods"]:
            test = got["methods"][method]["test"]
            assert test["class_names"][index] == name
            assert row[method]["value"] == pytest.approx(test["recall"][index])
            assert row[method]["low"] <= row[method]["value"] <= row[method]["high"]
            assert row["images"] == test["support"][index]
    assert [row["class"] for row in got["predictions"]] == ["class0", "class1", "class2"]
    with (tmp_path / "demo/gps/test_predictions.csv").open() as file:
        tested = {row["file"].replace("/", "-"): row for row in csv.DictReader(file)}
    for row in got["predictions"]:  # the same image, as a file of its own, by a process that knows the task file only
        assert tested[row["image"]]["prediction"] == row["prediction"]
        assert float(tested[row["image"]][f"p({row['prediction']})"]) == pytest.approx(row["probability"], abs=1e-5)
    assert got["methods"]["gps"]["delta_bytes"] == (tmp_path / "demo" / "gps" / "delta.safetensors").stat().st_size


def test_a_step_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.FewtuneError, match="`fewtune fitt` ended with status 2"):
        demo.command(["fitt"])
    assert "error: No such command" in capfd.readouterr().err
