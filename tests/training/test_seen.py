"""Images that a task was trained on are not scored as if they were new."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewtune
from fewtune.data import load_data
from fewtune.errors import DataError
from fewtune.tasks import evaluate, fit, load_task
from fewtune.training.seen import Seen, record
from masks import mask_folder
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("seen") / "images")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tiny_recipe(images, epochs=1, seed=3, importance="magnitude"), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Twelve images of two classes that no run has seen."""
    rng = np.random.default_rng(99)
    for label in range(2):
        (tmp_path / "others" / f"class{label}").mkdir(parents=True)
        for i in range(6):
            pixels = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            Image.fromarray(pixels).save(tmp_path / "others" / f"class{label}" / f"{i}.png")
    return tmp_path / "others"


def trained_images(images: Path) -> list[Path]:
    return [Path(path) for path in load_data(images, seed=3, test_fraction=0.25).train.records]


def test_an_undivided_folder_is_split_as_for_training(run: Any, images: Path, tmp_path: Path) -> None:
    """In another place too: the images tell, not the path."""
    moved = shutil.copytree(images, tmp_path / "moved")
    said: list[str] = []
    for data in (images, moved):
        got = evaluate(run.folder.delta, str(data), progress=said.append)
        told = got.to_json()
        assert told.pop("data") == {"split_again": {"seed": 3, "val_fraction": 0.2, "test_fraction": 0.25}}
        assert told == run.metrics["test"]
        assert [line for line in said if "split as for training" in line and "9 images" in line]


def test_what_was_trained_on_is_reported_apart_when_asked_for(run: Any, images: Path) -> None:
    got = evaluate(run.folder.delta, str(images), include_training=True)
    assert got.report.to_json() == run.metrics["test"]
    assert got.training.images == 27
    assert [row["trained_on"] for row in got.rows] == [0] * 9 + [1] * 27
    assert len(got.tables()) == 4


def test_renamed_copies_are_left_out_and_copies_that_were_encoded_anew_are_told(
    run: Any, images: Path, others: Path
) -> None:
    first, second, *_ = trained_images(images)
    shutil.copy(first, others / "class0" / "renamed.png")
    Image.open(second).save(others / "class1" / "again.jpg", quality=95)
    said: list[str] = []
    got = evaluate(run.folder.delta, str(others), progress=said.append)
    assert got.report.images == 13
    assert not [row for row in got.rows if "renamed" in row["file"]]
    assert got.told == {"left_out": 1, "alike": ["class1/again.jpg"]}
    assert [line for line in said if "left out" in line]
    assert [line for line in said if "look like copies" in line and "again.jpg" in line]


def test_nothing_left_is_one_line(run: Any, images: Path, tmp_path: Path) -> None:
    for number, path in enumerate(trained_images(images)):
        target = tmp_path / "seen" / path.parent.name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    with pytest.raises(DataError, match=r"all 22 images .* were trained on .* test_fraction=0.2"):
        evaluate(run.folder.delta, str(tmp_path / "seen"))
    apart = evaluate(run.folder.delta, str(tmp_path / "seen"), include_training=True)
    assert apart.report is None
    assert set(apart.to_json()) == {"training_images"}


def test_files_of_earlier_versions_are_read_and_told_to_have_no_list(run: Any, images: Path, tmp_path: Path) -> None:
    task = load_task(run.folder.delta)
    metadata = {key: value for key, value in task.delta.metadata.items() if key != "seen"}
    old = tmp_path / "old.safetensors"
    delta = fewtune.load_delta(run.folder.delta)
    type(delta)(**{**vars(delta), "metadata": metadata}).save(old)
    said: list[str] = []
    got = evaluate(old, str(images), progress=said.append)
    assert got.report.to_json() == run.metrics["test"]
    assert got.told["training_images_known"] is False
    assert [line for line in said if "holds no list" in line]


def test_a_limit_holds_for_an_undivided_folder_too(run: Any, others: Path) -> None:
    assert evaluate(run.folder.delta, str(others), limit_test=4).report.images == 4


def test_images_without_a_file_are_told_by_their_pixels(images: Path) -> None:
    """The same for kept copies in memory; and the record does not depend on the order."""
    split = load_data(images, val_fraction=0).train
    kept = split.cached(32, square=True)
    got = Seen.of({"seen": json.loads(json.dumps(record([kept.subset(range(10))])))})
    assert got.among(kept).tolist() == [True] * 10 + [False] * 26
    assert not got.among(split).any()
    assert record([kept.subset([3, 1]), None]) == record([kept.subset([1]), kept.subset([3])])


def test_a_cached_run_records_its_files(images: Path, tmp_path: Path) -> None:
    result = fit(tiny_recipe(images, epochs=1, cache=True, importance="magnitude"), tmp_path / "run")
    assert evaluate(result.folder.delta, str(images)).report.to_json() == result.metrics["test"]


def test_masks_too(tmp_path: Path) -> None:
    mask_folder(tmp_path / "masks", 12)
    recipe = tiny_recipe(
        tmp_path / "masks", task="segmentation", model="timm:test_vit", epochs=1, importance="magnitude"
    )
    result = fit(recipe, tmp_path / "run")
    got = evaluate(result.folder.delta, str(tmp_path / "masks"), include_training=True, accelerator="cpu")
    assert got.report.images == 3
    assert got.training.images == 9
    assert "split_again" in got.told


def test_fit_says_how_to_set_a_test_aside(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fewtune"):
        fit(tiny_recipe(images, epochs=1, importance="magnitude", test_fraction=None), tmp_path / "run")
    assert "test_fraction=0.2" in caplog.text
