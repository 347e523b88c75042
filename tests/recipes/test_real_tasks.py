"""VTAB-1k's recipes on the real images of the test data: checked, and run by the commands that the README names."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewtune.cli.app import app

DATA = Path(os.environ.get("FEWTUNE_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
TASKS = {
    "eurosat": ("eurosat_vtab1k.zip", 2000, ("AnnualCrop", "Forest")),
    "oxford_flowers102": ("flowers102_vtab1k.zip", 875, ("pink primrose", "hard-leaved pocket orchid")),
    "cifar": ("cifar100_vtablabels.zip", 2000, ("apple", "aquarium_fish")),
}
"""Recipe -> archive, test images, first two classes."""
QUICK = ("model=timm:test_vit", "pretrained=false", "image_size=32", "epochs=1", "limit_train=250", "limit_test=110",
         "workers=0", "accelerator=cpu", "importance=magnitude", "report=false")  # fmt: skip


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return result.stdout


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_on_its_real_task(task: str, tmp_path: Path) -> None:
    archive, tested, classes = TASKS[task]
    if not (DATA / archive).is_file():
        pytest.skip(f"{archive} is not in {DATA}; FEWTUNE_TEST_DATA says where it is")
    with zipfile.ZipFile(DATA / archive) as zipped:
        zipped.extractall(tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("train800.txt"))
    (tmp_path / "root/vtab-1k").mkdir(parents=True)
    folder.rename(tmp_path / "root/vtab-1k" / task)
    root = tmp_path / "root"
    said = run("data", "check", f"vtab/{task}", "--data", root, "--counts", f"test={tested}", "--sample", 100)
    assert f"is whole: 800 train, 200 val, {tested:,} test" in said
    got = json.loads(run("fit", f"vtab/{task}", "--data", root, "--out", tmp_path / "run", "--json", *QUICK))
    assert tuple(got["test"]["class_names"][:2]) == classes
    assert got["train_images"] == 250
    again = json.loads(
        run("evaluate", "--delta", tmp_path / "run/delta.safetensors", "--data", f"task:vtab/{task}?root={root}",
            "--limit-test", 110, "--accelerator", "cpu", "--json")
    )  # fmt: skip
    assert again["accuracy"]["value"] == got["test"]["accuracy"]["value"]
