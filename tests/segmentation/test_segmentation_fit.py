"""Whole runs of a tiny segmenter: fit, evaluate and predict through the command line, resume, delta, SAM."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fewtune import load_delta
from fewtune.classification.loaded import load_classifier
from fewtune.cli import _one_line
from fewtune.cli.app import app
from fewtune.config import Recipe, read_recipe, recipe_from
from fewtune.data import MaskSplit
from fewtune.errors import ConfigError, DataError, DeltaError
from fewtune.importance import gradient_importance
from fewtune.losses import segmentation_loss
from fewtune.segmentation.evaluate import evaluate, read_measures
from fewtune.segmentation.learner import MaskLearner, SegmentationLoss, mask_dice
from fewtune.segmentation.loaded import load_tuned_segmenter
from fewtune.segmentation.metrics import NAMES, dice, measure
from fewtune.segmentation.models import load_segmenter
from fewtune.segmentation.predict import probability_maps
from fewtune.segmentation.work import prepare
from fewtune.tasks import fit, task_of
from fewtune.training.tuners import score
from masks import mask_folder, scene
from runs import coloured_folder, fewtune, tiny_recipe
from segmenters import saved_sam

SETTINGS: dict[str, Any] = {
    "task": "segmentation", "model": "timm:test_vit", "pretrained": False, "image_size": 32, "augment": "flip",
    "test_fraction": 0.25, "val_fraction": 0.25, "epochs": 3, "warmup_epochs": 0, "batch_size": 4, "lr": 5e-3,
    "accelerator": "cpu",
}  # fmt: skip


def recipe(data: Path, **changes: Any) -> Recipe:
    return recipe_from({**SETTINGS, "data": str(data), **changes})


def settings(data: Path, **changes: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**SETTINGS, "data": data, **changes}.items()]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask_folder(tmp_path_factory.mktemp("data") / "scenes", 24)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of GPS through the command line, its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "gps"
    printed = run("fit", *settings(images, epochs=30, lr=2e-2, image_size=64, accumulate=2), "--out", out, "--json")
    return out, json.loads(printed)


def test_fit_evaluate_predict_through_the_command_line(
    trained: tuple[Path, dict], images: Path, tmp_path: Path
) -> None:
    out, printed = trained
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "versions.json", "metrics.json", "metrics.csv", "history.csv", "history.json", "checkpoint.ckpt",
        "selection.safetensors", "delta.safetensors", "test_predictions.csv", "curves.png", "tensorboard",
        "report.html",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert printed["test"] == metrics["test"]
    assert metrics["test"]["images"] == 6
    assert metrics["validation"]["dice"] == max(e["val_dice"] for e in json.loads((out / "history.json").read_text()))
    assert metrics["test"]["dice"]["value"] > 0.6  # a bright ellipse is easily learnt
    with (out / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["test_iou_value"]) == metrics["test"]["iou"]["value"]
    delta, sheet, scored = out / "delta.safetensors", tmp_path / "sheet.png", tmp_path / "scored.csv"
    common = ["--data", images, "--test-fraction", 0.25, "--accelerator", "cpu"]
    got = json.loads(run("evaluate", "--delta", delta, *common, "--predictions", scored, "--sheet", sheet, "--json"))
    assert got["dice"]["value"] == pytest.approx(metrics["test"]["dice"]["value"], abs=1e-6)
    assert set(got) == {"images", *NAMES}
    again, first = read_measures(scored), read_measures(out / "test_predictions.csv")
    assert again.keys() == first.keys()
    assert all(values == pytest.approx(first[name], abs=1e-6) for name, values in again.items())
    assert "mDice" in run("evaluate", "--delta", delta, *common)
    with Image.open(sheet) as picture:
        assert picture.height > 6 * 110
    masks = tmp_path / "masks"
    folder = images / "images"
    rows = json.loads(run("predict", folder, "--delta", delta, "--out", masks, "--accelerator", "cpu", "--json"))
    assert len(rows) == 24
    names = {f"scene{i:02d}.png" for i in range(24)}
    assert {path.name for path in masks.iterdir()} == {*names, "overlays"}
    assert {path.name for path in (masks / "overlays").iterdir()} == names
    measures = read_measures(out / "test_predictions.csv")
    for name, values in measures.items():
        with Image.open(masks / Path(name).name) as mask, Image.open(images / name) as image:
            assert mask.size == image.size
            painted = np.asarray(mask)
        assert set(np.unique(painted)) <= {0, 255}
        number = int(Path(name).stem[-2:])
        truth = scene(number, 36 + number % 5, 28 + number % 3)[1]
        assert dice(painted > 0, truth) == pytest.approx(values["dice"], abs=1e-6)


def test_export_of_a_task(trained: tuple[Path, dict], images: Path, tmp_path: Path) -> None:
    out, delta = tmp_path / "tuned.safetensors", trained[0] / "delta.safetensors"
    run("delta", "export", delta, "--out", out)
    segmenter = load_segmenter("timm:test_vit", image_size=64, pretrained=False)
    segmenter.model.load_state_dict(load_file(out), strict=True)
    files = sorted((images / "images").iterdir())[:2]
    maps = (list(probability_maps(one, files, torch.device("cpu"))) for one in
            (segmenter, load_tuned_segmenter(delta).segmenter))  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(*maps, strict=True))
    assert "timm:test_vit" in run("delta", "inspect", delta)
    for arguments in (["apply", delta, out], ["revert", delta, out]):
        done = CliRunner().invoke(app, ["delta", *map(str, arguments), "--out", str(tmp_path / "x.safetensors")])
        assert isinstance(done.exception, DeltaError)
        assert "is of a segmentation run" in str(done.exception)


def test_zero_shot_and_comparison(trained: tuple[Path, dict], images: Path, tmp_path: Path) -> None:
    """An untouched segmenter is scored by its name, and two files of measures are compared on the same images."""
    out, printed = trained
    before = tmp_path / "before.csv"
    common = ["--data", images, "--test-fraction", 0.25, "--accelerator", "cpu", "--image-size", 32]
    source = "timm:test_vit"
    model = load_segmenter(source, image_size=32, pretrained=False)
    torch.save(model.model.backbone.state_dict(), tmp_path / "backbone.pth")
    named = ["--model", f"file:{tmp_path / 'backbone.pth'}", "--arch", source]
    got = json.loads(run("evaluate", *named, *common, "--predictions", before, "--json"))
    assert got["images"] == 6
    gap = json.loads(run("evaluate", "--compare", before, out / "test_predictions.csv", "--json"))
    expected = printed["test"]["dice"]["value"] - got["dice"]["value"]
    assert gap["dice"]["value"] == pytest.approx(expected, abs=1e-6)
    assert gap["dice"]["low"] <= expected <= gap["dice"]["high"]
    assert "minus" in run("evaluate", "--compare", before, out / "test_predictions.csv")
    short = tmp_path / "short.csv"
    short.write_text("\n".join(before.read_text().splitlines()[:-1]) + "\n")
    mistaken = CliRunner().invoke(app, ["evaluate", "--compare", str(short), str(before)])
    assert isinstance(mistaken.exception, DataError)
    assert "different images" in str(mistaken.exception)


@pytest.mark.parametrize("method", ["linear", "bias", "full"])
def test_other_methods(images: Path, tmp_path: Path, method: str) -> None:
    """`linear` trains the decoder alone, by steps: there is no probe to converge."""
    result = fit(recipe(images, method=method, lr=1e-3), tmp_path / method)
    assert len(json.loads((tmp_path / method / "history.json").read_text())) == 3
    got = evaluate(str(images), delta=result.folder.delta, test_fraction=0.25, accelerator="cpu")
    assert got.report.to_json()["dice"] == pytest.approx(result.metrics["test"]["dice"], abs=1e-6)
    segmenter = load_segmenter("timm:test_vit", image_size=32, pretrained=False)
    decoder = sum(p.numel() for p in segmenter.model.decoder.parameters())
    whole = sum(p.numel() for p in segmenter.model.parameters())
    trained = result.metrics["trained"]
    assert {"linear": trained == decoder, "bias": decoder < trained < whole / 20, "full": trained == whole}[method]


@pytest.mark.parametrize("method", ["lora", "adapter", "ssf", "vpt-deep"])
def test_methods_that_add_modules(images: Path, tmp_path: Path, method: str) -> None:
    """Their task files are evaluated and drawn from like those of GPS."""
    result = fit(recipe(images, method=method, lr=1e-3, epochs=1), tmp_path / method)
    got = evaluate(str(images), delta=result.folder.delta, test_fraction=0.25, accelerator="cpu")
    assert got.report.to_json()["mae"] == pytest.approx(result.metrics["test"]["mae"], abs=1e-6)
    rows = json.loads(
        run("predict", images / "images/scene00.png", "--delta", result.folder.delta, "--out", tmp_path, "--json")
    )
    assert Path(rows[0]["mask"]).is_file()


def test_a_killed_run_goes_on_with_equal_numbers(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = fit(recipe(images, drop_path=0.1), tmp_path / "whole")
    step, made = MaskLearner.training_step, []

    def dies(self: MaskLearner, batch: Any, index: int) -> Any:
        made.append(index)
        if len(made) == 6:  # four steps an epoch: in the second one
            raise RuntimeError("killed")
        return step(self, batch, index)

    monkeypatch.setattr(MaskLearner, "training_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        fit(recipe(images, drop_path=0.1), tmp_path / "killed")
    monkeypatch.undo()
    assert not (tmp_path / "killed/metrics.json").exists()
    resumed = run("fit", "--resume", "--out", tmp_path / "killed", "--json")  # the folder tells the task
    assert json.loads(resumed)["test"] == whole.metrics["test"]
    assert load_delta(tmp_path / "killed/delta.safetensors").values.keys()
    for name, value in load_delta(whole.folder.delta).values.items():
        assert torch.equal(value, load_delta(tmp_path / "killed/delta.safetensors").values[name])


def test_connections_are_chosen_by_the_segmentation_loss_on_training_images_alone(
    images: Path, monkeypatch: Any
) -> None:
    seen: list[str] = []
    own = MaskSplit.image
    work = prepare(recipe(images, augment="plain", batch_size=18))
    monkeypatch.setattr(MaskSplit, "image", lambda self, i: (seen.append(self.names[i]), own(self, i))[1])
    scores = score(work)
    assert sorted(seen) == sorted(work.data.train.names)
    train = work.learner(lambda _: None).splits["train"]
    inputs, masks = (torch.stack(column) for column in zip(*(train[i] for i in range(len(train))), strict=True))
    model = work.fresh_model()
    logits = torch.nn.functional.interpolate(model(inputs), size=(32, 32), mode="bilinear", align_corners=False)
    segmentation_loss(logits, masks).mean().backward()
    for name, parameter in model.named_parameters():
        if name in scores:
            assert parameter.grad is not None
            assert torch.allclose(scores[name], parameter.grad.abs(), atol=1e-6), name


def test_select_writes_what_fit_trains(images: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.safetensors"
    told = json.loads(run("select", *settings(images), "--out", chosen, "--json"))
    result = fit(recipe(images, selection=str(chosen), epochs=1), tmp_path / "run")
    assert result.metrics["trained"] == told["trained"]


def test_search_judges_by_dice(images: Path, tmp_path: Path) -> None:
    short = {"search_lr": "[1e-5,1e-2]", "search_k": "[1]", "search_epochs": 4, "epochs": 1}
    run("fit", *settings(images, **short), "--search", "--out", tmp_path / "run")
    with (tmp_path / "run/search.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (float(row["val_dice"]), -float(row["val_loss"])))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["validation"]["dice"] >= 0
    assert read_recipe([tmp_path / "run/config.yaml"]).lr == float(best["lr"])


def test_training_on_validation_images_too_takes_the_last_epoch(images: Path, tmp_path: Path) -> None:
    result = fit(recipe(images, train_on="train+val", epochs=2), tmp_path / "run")
    assert result.metrics["validation"] == {"epoch": 1}
    assert "val_dice" not in (tmp_path / "run/history.csv").read_text()
    assert "no validation images" in run("fit", "--resume", "--out", tmp_path / "run")


def test_recomputed_activations_change_nothing(images: Path, tmp_path: Path) -> None:
    plain = fit(recipe(images, epochs=1), tmp_path / "plain").metrics
    less = fit(recipe(images, epochs=1, checkpoint_activations=True), tmp_path / "less").metrics
    assert less["test"]["mae"]["value"] == pytest.approx(plain["test"]["mae"]["value"], abs=1e-6)


def test_select_fit_delta_revert_predict_of_sam(images: Path, tmp_path: Path) -> None:
    """A small random SamModel of transformers' classes; relative-position tables and norms stay frozen."""
    source = saved_sam(tmp_path / "sam")
    run_recipe = recipe(images, model=source, image_size=64, pretrained=True, lr=1e-3, batch_size=1, epochs=2,
                        limit_train=8)  # fmt: skip
    result = fit(run_recipe, tmp_path / "run")
    delta = load_delta(result.folder.delta)
    untouched = load_segmenter(source, image_size=64)
    before = {name: tensor.clone() for name, tensor in untouched.model.state_dict().items()}
    files = sorted((images / "images").iterdir())[:3]
    device = torch.device("cpu")
    maps = list(probability_maps(untouched, files, device))
    task = load_tuned_segmenter(result.folder.delta)
    tuned = list(probability_maps(task.segmenter, files, device))
    assert all(m.shape == (Image.open(f).height, Image.open(f).width) for m, f in zip(maps, files, strict=True))
    assert max(float(np.abs(a - b).max()) for a, b in zip(maps, tuned, strict=True)) > 1e-3
    delta.apply(untouched.model)
    again = list(probability_maps(untouched, files, device))
    assert all(np.array_equal(a, b) for a, b in zip(again, tuned, strict=True))
    moved = [name for name, tensor in untouched.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("mask_decoder" in name for name in moved)
    assert any("vision_encoder" in name and name.endswith("weight") for name in moved)
    assert any("neck.conv" in name for name in moved)
    assert not any("rel_pos" in name or "pos_embed" in name or "layer_norm" in name for name in moved
                   if "mask_decoder" not in name)  # fmt: skip
    delta.revert(untouched.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.model.state_dict().items())
    reverted = list(probability_maps(untouched, files, device))
    assert all(np.array_equal(a, b) for a, b in zip(reverted, maps, strict=True))


def test_validation_dice_is_the_metric(images: Path) -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 1, 9, 8), (torch.rand(5, 1, 9, 8) > 0.6).float()
    masks[0] = 0
    logits[1], masks[1] = -5, 0
    truth = masks[:, 0].numpy() > 0
    probabilities = logits.sigmoid()[:, 0].numpy()
    expected = [measure(p, t).dice for p, t in zip(probabilities, truth, strict=True)]
    assert mask_dice(logits, masks).tolist() == pytest.approx(expected)


def test_scores_are_taken_at_the_images_own_size(images: Path) -> None:
    """A map that is right at the input's size is scored on the truth in full, not on a shrunken one."""
    work = prepare(recipe(images))
    maps = list(probability_maps(work.backbone, work.data.train.images, torch.device("cpu"), batch_size=5))
    single = list(probability_maps(work.backbone, work.data.train.images, torch.device("cpu")))
    for index, (one, other) in enumerate(zip(maps, single, strict=True)):
        assert one.shape == work.data.train.mask(index).shape
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "fgvc"}, "augment=fgvc"),
        ({"mixup": 0.2, "shots": 4}, "shots, mixup"),
        ({"objective": "supcon"}, "supcon is no objective of segmentation"),
    ],
)
def test_settings_of_classification_are_refused(images: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(images, **changes)


def test_mistakes_on_the_command_line_are_one_line(trained: tuple[Path, dict], images: Path, tmp_path: Path) -> None:
    delta = trained[0] / "delta.safetensors"
    lonely = tmp_path / "lonely"
    mask_folder(lonely, 6)
    (lonely / "masks/scene02.png").unlink()
    cases: dict[str, tuple[str | Path, ...]] = {
        "scene02.png has no mask": ("fit", *settings(lonely), "--out", tmp_path / "x"),
        "must be a folder": ("predict", str(images / "images"), "--delta", delta),
        "would overwrite": ("predict", str(images / "masks"), "--delta", delta, "--out", images / "masks"),
        "has no val split": (
            "evaluate",
            "--delta",
            delta,
            "--data",
            images,
            "--split",
            "val",
            "--test-fraction",
            "0.25",
        ),
        "has masks and no classes": ("fit", f"data=task:kvasir-seg?root={images}", "model=timm:test_vit"),
    }
    for words, arguments in cases.items():
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
        told = _one_line(done.exception) if isinstance(done.exception, Exception) else None
        assert told is not None, (words, done.exception)
        assert words in told
    done = fewtune(*cases["scene02.png has no mask"])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "scene02.png has no mask" in line


def test_the_two_kinds_of_task_are_not_mistaken_for_each_other(
    trained: tuple[Path, dict], images: Path, tmp_path: Path
) -> None:
    masks = trained[0] / "delta.safetensors"
    classes = coloured_folder(tmp_path / "classes")
    classifier = fit(tiny_recipe(classes, epochs=1), tmp_path / "classifier")
    assert [task_of(file).name for file in (classifier.folder.delta, masks)] == ["classification", "segmentation"]
    with pytest.raises(DeltaError, match="is of a segmentation run, expected one of classification"):
        load_classifier(masks)
    with pytest.raises(DeltaError, match="no task file of a segmentation run"):
        load_tuned_segmenter(classifier.folder.delta)
    with pytest.raises(ConfigError, match="give a task file"):
        evaluate(str(images))


def test_the_objective_is_a_scalar_of_the_batch(images: Path) -> None:
    segmenter = load_segmenter("timm:test_vit", image_size=32, pretrained=False)
    batch: Callable[[], tuple] = lambda: (torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32))  # noqa: E731
    scores = gradient_importance(segmenter.model, [batch()], SegmentationLoss(), segmenter.head)
    assert not any(name.startswith("decoder") for name in scores)
