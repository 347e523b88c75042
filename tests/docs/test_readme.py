"""The README's Python and shell are run as they stand, but for a small random model in place of the pretrained ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from images import class_folders

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    (code,) = blocks("python")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create("test_vit", **options).eval())
    monkeypatch.chdir(tmp_path)
    images = torch.randn(8, 3, 160, 160)
    exec(code, {"loader": [(images, torch.arange(8) % 4), (images + 1, torch.arange(8) % 4)]})
    assert "trained whole, head" in capsys.readouterr().out
    assert (tmp_path / "birds.safetensors").exists()


def test_shell(tmp_path: Path) -> None:
    (script,) = blocks("sh")
    class_folders(tmp_path / "photos", {"rose": 12, "daisy": 12})
    pip, *commands = script.strip().splitlines()
    assert pip == "pip install 'fewtune[train]'"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "fewtune"
        small = [a.replace("timm:vit_small_patch16_224.augreg_in21k", "timm:test_vit") for a in arguments]
        settings = ["pretrained=false", "epochs=1", "image_size=160"] if arguments[0] == "fit" else []
        line = [sys.executable, "-m", "fewtune", *small, *settings]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "photos-timm.safetensors").exists()


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_page_of_settings_is_of_today() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import runpy; print(runpy.run_path('docs/make_recipe_page.py')['page'](), end='')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
