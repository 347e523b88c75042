"""Features before and after in a report, or a word why there are none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fewtune.analysis import image_features, neighbours_alike
from fewtune.data import load_data
from fewtune.report import features
from fewtune.report.features import planes
from fewtune.report.reading import Run, read_run
from fewtune.tasks import fit, load_task
from fewtune.training.loaders import image_loader
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("features")
    data = coloured_folder(root / "data", each=18)
    recipe = tiny_recipe(data, epochs=2, warmup_epochs=0, lr=1e-2, test_fraction=0.7, report=False)
    return read_run(fit(recipe, root / "run").folder.path)


def test_the_chart_is_of_the_features_of_the_test_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SECONDS", 600.0)
    found = planes(run)
    assert found.absent is None
    assert found.images == len(run.rows) >= features.FEWEST
    task = load_task(run.path / "delta.safetensors")
    test = load_data(run.recipe["data"], test_fraction=0.7).test
    assert test is not None
    loader = image_loader(test.with_transform(task.transform), 16)
    assert found.alike[1] == neighbours_alike(*image_features(task.backbone.model, loader))
    assert len(found.charts) == 2
    for chart, title in zip(found.charts, ("before tuning", "after tuning"), strict=True):
        for word in (title, "class0", "class1", "class2"):
            assert word in chart
        assert chart.count("<use") > len(run.rows)  # each image, and ticks of the legend
    assert ["wrong" in chart for chart in found.charts] == [False, True]


def test_a_slow_model_gets_fewer_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_affordable", lambda *_: 30)
    assert planes(run).images == 30
    monkeypatch.setattr(features, "_affordable", lambda *_: 29)
    assert "more than 10 seconds" in (planes(run).absent or "")


def test_what_is_not_at_hand_is_said(run: Run, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run.path, tmp_path / "run"))
    config = moved / "config.yaml"
    config.write_text(re.sub(r"^data: .*", f"data: {tmp_path / 'nowhere'}", config.read_text(), flags=re.M))
    assert "They are not shown" in (planes(read_run(moved)).absent or "")
    (moved / "delta.safetensors").unlink()
    shutil.copy(run.path / "config.yaml", config)
    assert "does not exist" in (planes(read_run(moved)).absent or "")
    few = moved / "test_predictions.csv"
    few.write_text("".join(few.read_text().splitlines(keepends=True)[:10]))
    assert "need at least 30 test images" in (planes(read_run(moved)).absent or "")
