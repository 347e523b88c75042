"""The demo's path, on a tiny random model and generated images in place of the fetched ones."""

from __future__ import annotations

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
    monkeypatch.setattr(demo, "SETTINGS", ("pretrained=false", "image_size=32", "epochs=1", "accelerator=cpu"))
    monkeypatch.setattr(sys, "argv", ["fewtune", "demo", "--out", str(tmp_path / "demo"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == ["linear", "gps"]
    assert found["methods"]["linear"]["trained"] == 3 * 65
    accuracies = [found["methods"][method]["test"]["accuracy"]["value"] for method in ("linear", "gps")]
    assert found["gps minus linear"]["value"] == pytest.approx(accuracies[1] - accuracies[0])
    assert [row["class"] for row in found["predictions"]] == ["class0"] * 2 + ["class1"] * 2 + ["class2"] * 2
    assert found["methods"]["gps"]["delta_bytes"] == (tmp_path / "demo" / "gps" / "delta.safetensors").stat().st_size


def test_a_step_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.FewtuneError, match="`fewtune fitt` ended with status 2"):
        demo.command(["fitt"])
    assert "error: No such command" in capfd.readouterr().err
