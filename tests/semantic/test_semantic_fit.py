"""Masks of several classes, from the folder to the task file, its masks, its sheet and its report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from class_masks import IGNORED, NAMES, class_mask_folder, scene
from fewtune.cli.app import app
from fewtune.data import load_class_masks
from fewtune.data.class_masks import open_class_mask, palette
from fewtune.data.mask_transforms import classes_at
from fewtune.errors import DataError, DeltaError, ModelError
from fewtune.report import write_report
from fewtune.segmentation.loaded import load_tuned_segmenter
from fewtune.segmentation.models import load_segmenter
from fewtune.segmentation.sizes import at_size
from fewtune.semantic.metrics import confusion_of, report
from fewtune.tasks import compare, evaluate, fit, load_task, predict, prepare
from fewtune.training.fit import Result
from masks import mask_folder
from mosaics import ARCHIVE, write_mosaics
from runs import tiny_recipe

SETTINGS: dict[str, Any] = {
    "task": "semantic-segmentation", "model": "timm:test_vit", "image_size": 128, "lr": 0.01, "epochs": 10,
    "batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("semantic")
    return fit(tiny_recipe(class_mask_folder(root / "data"), **SETTINGS), root / "run")


def test_a_run_learns_and_its_measures_are_those_of_the_masks_that_it_draws(run: Result, tmp_path: Path) -> None:
    test, data = run.metrics["test"], Path(run.metrics["data"])
    rows = list(csv.DictReader(run.folder.predictions.open(newline="")))
    assert test["images"] == len(rows) == 6
    assert test["class_names"] == list(NAMES)
    assert set(run.metrics["validation"]) == {"epoch", "loss", "miou"}
    files = [data / row["file"] for row in rows]
    told = predict(run.folder.delta, files, out=tmp_path / "out", accelerator="cpu")
    painted = [np.asarray(Image.open(row["mask"])) for row in told]
    truth = [np.asarray(Image.open(data / "masks" / file.name)) for file in files]
    assert [one.shape for one in painted] == [one.shape for one in truth]
    p, y = (np.concatenate([one.ravel() for one in many]) for many in (painted, truth))
    kept = y != IGNORED
    iou = jaccard_score(y[kept], p[kept], labels=[0, 1, 2], average=None, zero_division=0)
    assert test["iou_by_class"] == pytest.approx(iou)
    assert test["miou"]["value"] == pytest.approx(iou.mean())
    assert test["mdice"]["value"] == pytest.approx(f1_score(y[kept], p[kept], labels=[0, 1, 2], average="macro"))
    ground = (y[kept] == 0).mean() / 3  # of masks that are ground alone
    assert test["miou"]["value"] > ground + 0.05
    assert told[0]["share(ground)"] == pytest.approx((painted[0] == 0).mean(), abs=1e-6)


def test_what_chooses_the_epoch_counts_pixels_as_the_test_does(run: Result) -> None:
    work = prepare(tiny_recipe(run.metrics["data"], **SETTINGS, limit_train=10))
    learner = work.learner(lambda _: pytest.fail("nothing is trained here"))
    images, labels = map(torch.stack, zip(*map(work.train.__getitem__, range(3)), strict=True))
    with torch.no_grad():
        loss, counts = learner.judged(images, labels)
        painted = at_size(learner(images), labels.shape[-2:]).argmax(1)
    expected = [confusion_of(p, y, 3, IGNORED) for p, y in zip(painted.numpy(), labels.numpy(), strict=True)]
    assert np.array_equal(counts.numpy(), np.stack(expected))
    assert learner.overall(loss, counts)[1] == pytest.approx(report(expected, NAMES).miou.value)


def test_masks_are_pngs_of_class_numbers_with_a_palette(run: Result, tmp_path: Path) -> None:
    image = next((Path(run.metrics["data"]) / "images").glob("*.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = predict(
        run.folder.delta, [image, tmp_path / "bad.png"], out=tmp_path / "out", accelerator="cpu", strict=False
    )
    assert [bool(row["error"]) for row in rows] == [False, True]
    drawn = Image.open(rows[0]["mask"])
    assert drawn.mode == "P"
    assert [tuple(drawn.getpalette()[3 * c : 3 * c + 3]) for c in range(3)] == palette()[:3] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0),
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "overlays" / image.name).size == drawn.size == Image.open(image).size
    assert np.array_equal(open_class_mask(rows[0]["mask"]), np.asarray(drawn))


def test_evaluate_scores_the_same_test_images_and_draws_a_sheet(run: Result, tmp_path: Path) -> None:
    got = evaluate(run.folder.delta, run.metrics["data"], accelerator="cpu")
    told = got.to_json()
    assert told.pop("data")["split_again"]["test_fraction"] == 0.25
    assert told["confusion"] == run.metrics["test"]["confusion"]
    assert [row["class"] for row in got.tables()[1]] == list(NAMES)
    got.draw(3, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 3 * 160
    apart = evaluate(run.folder.delta, run.metrics["data"], accelerator="cpu", include_training=True).to_json()
    assert apart["training_images"]["images"] == 18
    assert compare(run.folder.predictions, run.folder.predictions).differences["dice"].value == 0


def test_the_report_names_the_classes_and_shows_the_worst_masks(run: Result, tmp_path: Path) -> None:
    page = write_report([run.folder.path], tmp_path / "page.html").read_text()
    assert "mean IoU over classes" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in NAMES)
    assert 'class="sheet"' in page
    short = SETTINGS | {"epochs": 1, "method": "bias"}
    other = fit(tiny_recipe(run.metrics["data"], **short), tmp_path / "bias")
    page = write_report([other.folder.path, run.folder.path], tmp_path / "both.html").read_text()
    assert f"{run.folder.path.name} minus bias" in page


def test_from_the_shell(run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--delta", str(run.folder.delta), "--data", run.metrics["data"], "--sheet", str(tmp_path / "s.png")]
    app(["evaluate", *common, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["miou"]["value"] == pytest.approx(run.metrics["test"]["miou"]["value"])
    assert (tmp_path / "s.png").exists()
    image = str(next((Path(run.metrics["data"]) / "images").glob("*.png")))
    app(["predict", image, "--delta", str(run.folder.delta), "--out", str(tmp_path / "out")], standalone_mode=False)
    assert "share(disc)" in capsys.readouterr().out


def test_grey_masks_and_masks_with_a_palette_are_the_same_data(tmp_path: Path) -> None:
    one, two = (
        load_class_masks(class_mask_folder(tmp_path / str(palette), 6, palette, named), val_fraction=0)
        for palette, named in ((True, True), (False, False))
    )
    assert one.class_names == NAMES
    assert two.class_names == ("0", "1", "2")
    for index in range(6):
        assert np.array_equal(one.train.mask(index), two.train.mask(index))
        assert np.array_equal(one.train.mask(index), scene(index, 30 + index % 3, 32 + index % 5)[1])


def test_a_resized_mask_has_no_class_that_was_not_there() -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:], mask[0] = 9, 255
    assert set(classes_at(mask, (5, 3)).unique().tolist()) <= {0, 9, 255}
    assert torch.equal(classes_at(mask, (8, 8)), torch.from_numpy(mask).long())
    assert torch.equal(classes_at(mask, (16, 16))[::2, ::2], torch.from_numpy(mask).long())


def test_what_does_not_fit_is_said(run: Result, tmp_path: Path) -> None:
    black_and_white = mask_folder(tmp_path / "objects", 6)
    with pytest.raises(DataError, match="mode RGB; a mask of several classes is a PNG"):
        fit(tiny_recipe(black_and_white, **SETTINGS), tmp_path / "run")
    for file in (black_and_white / "masks").glob("*.png"):
        Image.open(file).convert("L").save(file)
    with pytest.raises(DataError, match="black and white are for task=segmentation"):
        fit(tiny_recipe(black_and_white, **SETTINGS), tmp_path / "run")
    three = class_mask_folder(tmp_path / "three", 6)
    with pytest.raises(DataError, match=r"task=semantic-segmentation"):
        fit(tiny_recipe(three, **SETTINGS | {"task": "segmentation"}), tmp_path / "run")
    (three / "classes.txt").write_text("ground\nsquare\n")
    with pytest.raises(DataError, match="holds the number 2 and the task has the classes 0 to 1"):
        fit(tiny_recipe(three, **SETTINGS), tmp_path / "run")
    with pytest.raises(DataError, match="names the classes ground, square, and the task has ground, square, disc"):
        evaluate(run.folder.delta, str(three), accelerator="cpu")
    with pytest.raises(DeltaError, match="no task file of a segmentation run"):
        load_tuned_segmenter(run.folder.delta)


def test_tasks_of_other_numbers_of_classes_share_a_loaded_segmenter(run: Result, tmp_path: Path) -> None:
    objects = fit(
        tiny_recipe(mask_folder(tmp_path / "objects", 8), **SETTINGS | {"task": "segmentation", "epochs": 1}),
        tmp_path / "objects-run",
    )
    first = load_task(run.folder.delta)
    second = load_task(objects.folder.delta, backbone=first.plain)
    assert second.backbone.model is first.backbone.model
    third = load_task(run.folder.delta, backbone=second.plain)
    images = sorted((Path(run.metrics["data"]) / "images").glob("*.png"))[:2]
    from fewtune.semantic.predict import predict as draw

    draw(third, images, tmp_path / "again", accelerator="cpu")
    predict(run.folder.delta, images, out=tmp_path / "alone", accelerator="cpu")
    for image in images:
        assert (tmp_path / "again" / image.name).read_bytes() == (tmp_path / "alone" / image.name).read_bytes()


def test_the_segmenters_name_without_the_task_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a segmenter.*add task=segmentation"):
        prepare(tiny_recipe(tmp_path, model="demo:vit-small-saliency"))
    several = load_segmenter("demo:vit-small-saliency", pretrained=False, classes=3, image_size=28)
    assert several.model(torch.zeros(1, 3, 28, 28)).shape == (1, 3, 16, 16)
    assert several.describe()["arguments"]["classes"] == 3
    with pytest.raises(ModelError, match="draws one mask and the task has 3 classes"):
        load_segmenter("sam:vit-b", pretrained=False, classes=3)


@pytest.mark.data
def test_on_mosaics_of_eurosat_the_measures_are_scikit_learn_s_and_torchmetrics(tmp_path: Path) -> None:
    if not ARCHIVE.exists():
        pytest.skip(f"EuroSAT is not at {ARCHIVE}; FEWTUNE_TEST_DATA says where")
    data = write_mosaics(tmp_path / "mosaics", train=40, test=20)
    settings = {**SETTINGS, "epochs": 2, "test_fraction": None, "method": "bias"}
    run = fit(tiny_recipe(data, **settings), tmp_path / "run")
    predict(run.folder.delta, [data / "test" / "images"], out=tmp_path / "out", accelerator="cpu", overlays=False)
    files = sorted((tmp_path / "out").glob("*.png"))
    p = np.concatenate([np.asarray(Image.open(file)).ravel() for file in files])
    y = np.concatenate([np.asarray(Image.open(data / "test" / "masks" / file.name)).ravel() for file in files])
    kept, test = y != IGNORED, run.metrics["test"]
    present = np.unique(y[kept]).tolist()
    iou = jaccard_score(y[kept], p[kept], labels=present, average=None, zero_division=0)
    assert [test["iou_by_class"][c] for c in present] == pytest.approx(iou)
    assert test["miou"]["value"] == pytest.approx(iou.mean())
    counted = {"num_classes": 10, "average": "none", "ignore_index": IGNORED}
    theirs = multiclass_jaccard_index(torch.from_numpy(p).long(), torch.from_numpy(y).long(), **counted)
    assert [test["iou_by_class"][c] for c in present] == pytest.approx(theirs[present].tolist(), abs=1e-6)
    assert test["accuracy"] == pytest.approx((p == y)[kept].mean())
