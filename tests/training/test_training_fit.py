"""Whole runs of a tiny model: what a run folder holds, which epoch is kept, what stops a run, search."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fewtune
from fewtune.classification.learner import Classifier
from fewtune.config import read_recipe
from fewtune.errors import ConfigError
from fewtune.tasks import evaluate, fit, predict
from fewtune.training.learner import NonFiniteLoss
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with everything that can be switched on."""
    recipe = tiny_recipe(
        images, epochs=4, ema=0.8, lr=5e-3, k=2, mixup=0.2, cutmix=0.5, label_smoothing=0.1, drop_path=0.1,
        class_weights="balanced", augment="fgvc", clip=1.0, accumulate=2, head_lr=1e-2, optimizer="adamw", workers=1,
    )  # fmt: skip
    return fit(recipe, tmp_path_factory.mktemp("runs") / "all"), recipe


def test_run_folder_is_complete(run: Any) -> None:
    result, recipe = run
    folder = result.folder
    assert {path.name for path in folder.path.iterdir()} == {
        "config.yaml", "versions.json", "metrics.json", "metrics.csv", "history.csv", "history.json", "checkpoint.ckpt",
        "selection.safetensors", "delta.safetensors", "test_predictions.csv", "curves.png", "tensorboard",
    }  # fmt: skip
    assert read_recipe([folder.config]) == recipe
    assert json.loads(folder.versions.read_text())["torch"] == torch.__version__.partition("+")[0]
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert any(folder.tensorboard.iterdir())
    metrics = json.loads(folder.metrics.read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["delta_bytes"] == os.path.getsize(folder.delta)
    selection = fewtune.Selection.load(folder.selection)
    assert metrics["trained"] == selection.trained
    assert selection.connections == 2 * 3136  # two connections for each of the model's neurons
    assert metrics["test"]["images"] == 9


def test_the_best_epoch_is_kept_and_is_what_the_task_file_holds(run: Any, images: Path) -> None:
    """Also where weights are averaged: the averaged ones are judged and saved."""
    result, _ = run
    history = json.loads(result.folder.history.with_suffix(".json").read_text())
    best = max(history, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))
    assert result.metrics["validation"]["epoch"] == best["epoch"]
    got = evaluate(
        result.folder.delta, str(images), split="val", val_fraction=0.2, test_fraction=0.25, include_training=True
    )
    assert got.report is None  # they chose the epoch
    assert got.training.accuracy.value == pytest.approx(best["val_accuracy"])


def test_the_checkpoint_is_compact_and_plain(run: Any) -> None:
    result, _ = run
    state = torch.load(result.folder.checkpoint, weights_only=True)
    assert sum(value.numel() for value in state["state_dict"]["values"].values()) == result.metrics["trained"]
    # values, their averages, the best ones, and Adam's two moments: five numbers for each trained one
    assert result.folder.checkpoint.stat().st_size < 5 * 4 * result.metrics["trained"] + 200_000
    assert state["fewtune"]["average"]["steps"] == state["global_step"]


def test_predictions_need_the_task_file_alone(run: Any, images: Path) -> None:
    result, _ = run
    rows = predict(result.folder.delta, [images / "class0", images / "class1" / "03.png"])
    assert len(rows) == 13
    assert rows[-1]["file"].endswith("03.png")
    for row in rows:
        each = [row[f"p(class{label})"] for label in range(3)]
        assert sum(each) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == f"class{each.index(max(each))}"


@pytest.mark.parametrize("method", ["linear", "bias", "full"])
def test_other_methods_have_task_files_too(images: Path, tmp_path: Path, method: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("fewtune.methods.linear.REGULARISATION", (1e-2, 1.0))
    result = fit(tiny_recipe(images, method=method, epochs=2, lr=1e-3), tmp_path / method)
    got = evaluate(result.folder.delta, str(images), test_fraction=0.25)
    assert got.report.to_json() == result.metrics["test"]
    assert got.report.accuracy.value > 1 / 3  # chance; two epochs learn more or less by the version of torch


def test_the_images_of_a_batch_without_a_finite_loss_are_named_and_the_good_state_is_kept(
    images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    forward = Classifier.forward

    def broken(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (float("nan") if self.current_epoch == 2 and self.training else 1.0)

    monkeypatch.setattr(Classifier, "forward", broken)
    with pytest.raises(NonFiniteLoss, match=r"nan in epoch 2 on the images .*\.png.*state after epoch 1 is kept"):
        fit(tiny_recipe(images, epochs=4), tmp_path / "run")
    assert torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)["fewtune"]["history"][-1]["epoch"] == 1
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert len(predict(tmp_path / "run" / "delta.safetensors", [images])) == 36


def test_a_folder_is_not_overwritten_or_resumed_by_mistake(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = tiny_recipe(images, epochs=1)
    with pytest.raises(ConfigError, match="no run to resume"):
        fit(None, out, resume=True)
    fit(recipe, out)
    with pytest.raises(ConfigError, match="is not empty"):
        fit(recipe, out)
    with pytest.raises(ConfigError, match=r"other settings.*lr was 0.001 and is 0.002"):
        fit(recipe.changed(lr=2e-3), out, resume=True)
    with pytest.raises(ConfigError, match="give one of them"):
        fit(recipe, out, resume=True, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nothing in it is overwritten"):
        fit(recipe, foreign, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        fit(recipe, foreign / "thesis.txt")
    again = fit(recipe.changed(devices=1), out, resume=True)  # complete: nothing is done
    assert json.loads(again.folder.metrics.read_text()) == again.metrics


def test_a_bad_start_leaves_no_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(fewtune.FewtuneError):
        fit(tiny_recipe(images, model="timm:test_vti"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_saved_selection_is_trained(images: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fewtune.methods.criteria.gradient_importance", pytest.fail)
    saved = run[0].folder.selection
    result = fit(tiny_recipe(images, selection=str(saved), epochs=1), tmp_path / "run")
    assert fewtune.Selection.load(result.folder.selection) == fewtune.Selection.load(saved)
