"""Data of a user's own: identical images in two parts, images of several classes, masks by mistake, other formats."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import images
from fewtune.cli.app import app
from fewtune.config import recipe_from
from fewtune.data import formats, load_data
from fewtune.data.listing import Expected, Format, Item, Listing
from fewtune.errors import DataError
from fewtune.tasks import prepare
from images import fails


def check(path: Path) -> tuple[int, str]:
    """`fewtune data check PATH`: exit status and what it printed."""
    result = CliRunner().invoke(app, ["data", "check", str(path)])
    return result.exit_code, result.stdout


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, no image in both."""
    images.class_folders(tmp_path / "train", {"a": 4, "b": 4})
    for name in ("a", "b"):
        for i in range(2):
            images.plain(tmp_path / "test" / name / f"{i}.png", images.GREY, seed=50 + i + 10 * (name == "b"))
    return tmp_path


def test_check_of_a_folder_tells_images_in_two_parts_and_under_two_labels(parts: Path) -> None:
    assert check(parts) == (0, f"{parts} is whole: 8 train, 4 test; 2 classes; 12 images opened\n")
    shutil.copy(parts / "train/a/001.png", parts / "test/b/other name.png")
    shutil.copy(parts / "train/b/002.png", parts / "test/b/again.png")
    shutil.copy(parts / "train/a/003.png", parts / "train/b/as b.png")
    status, text = check(parts)
    assert status == 2
    assert "test/b/other name.png (test) is the same image as train/a/001.png" in text
    (line,) = [line for line in text.splitlines() if "other name" in line]
    assert line.endswith("under another label")
    assert "test/b/again.png (test) is the same image as train/b/002.png" in text
    assert "train/b/as b.png (train) is the same image as train/a/003.png, which is a train image under another" in text
    assert "has 3 faults" in text


def test_an_image_twice_in_an_undivided_folder_is_told(tmp_path: Path) -> None:
    images.class_folders(tmp_path, {"a": 4, "b": 4})
    assert check(tmp_path)[0] == 0
    shutil.copy(tmp_path / "a/001.png", tmp_path / "a/twice.png")
    status, text = check(tmp_path)
    assert status == 2
    assert "a/twice.png is the same image as a/001.png" in text


def test_fit_is_warned_of_test_images_that_are_trained_on(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_data(parts).check()
        assert not caplog.messages
        shutil.copy(parts / "train/a/001.png", parts / "test/b/other name.png")
        load_data(parts).check()
    (said,) = caplog.messages
    assert "1 of 5 test images are also trained or validated on (1 of them under another label)" in said


def test_images_and_masks_are_called_that(tmp_path: Path) -> None:
    images.class_folders(tmp_path, {"images": 3, "masks": 3})
    fails(tmp_path, "looks like images with their masks", "add task=segmentation")


def test_csv_of_several_classes_an_image(tmp_path: Path) -> None:
    images.class_folders(tmp_path, {"x": 12})
    rows = [f"x/{i:03d}.png,{label}" for i, label in enumerate(["red;round", "red", "round; big"] * 4)]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(rows))
    data = load_data(tmp_path / "list.csv", val_fraction=0.25)
    data.check()
    assert data.class_names == ("big", "red", "round")
    assert data.multi_label
    with pytest.raises(DataError, match="several classes"):
        prepare(recipe_from({"model": "timm:test_vit", "data": str(tmp_path / "list.csv"), "pretrained": False}))
    whole = load_data(tmp_path / "list.csv", val_fraction=0).train
    assert whole.labels[:3] == [(1, 2), (1,), (0, 2)]
    assert torch.equal(whole[2][1], torch.tensor([1.0, 0.0, 1.0]))
    assert whole.counts(3) == [4, 8, 8]
    assert data.val is not None
    assert min(data.train.counts(3)) >= 1
    (tmp_path / "list.csv").write_text(
        "path,labels,split\nx/000.png,red,train\nx/001.png,,train\nx/002.png,blue,test\n"
    )
    fails(tmp_path / "list.csv", 'x/002.png has the label "blue", which no training image has')
    (tmp_path / "list.csv").write_text("path,labels\nx/000.png,red\nx/001.png,\nx/002.png,round\nx/003.png,red\n")
    assert load_data(tmp_path / "list.csv", val_fraction=0).train.labels == [(0,), (), (1,), (0,)]
    fails(tmp_path / "list.csv", "shots=1", "several", shots=1, val_fraction=0)


def test_a_format_from_outside_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of NUMBER_CLASS.png files, as a package offers it by the entry point fewtune.formats."""
    for i in range(6):
        images.plain(tmp_path / f"{i}_{i % 2}.png", images.RED, seed=i)

    def listed(folder: Path, expected: Expected) -> Listing:
        files = sorted(folder.glob("*_*.png"))
        return Listing("mine", ("0", "1"), {"train": [Item(f.name, f, int(f.stem[-1])) for f in files]})

    mine = Format("mine", "NUMBER_CLASS.png", lambda path: any(path.glob("*_*.png")), listed)
    monkeypatch.setattr(formats, "outside_formats", lambda: (mine,))
    data = load_data(tmp_path, val_fraction=0)
    assert (data.name, data.train.labels) == ("mine", [0, 1] * 3)
    assert check(tmp_path)[0] == 0
