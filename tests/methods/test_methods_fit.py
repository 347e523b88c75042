"""Whole runs of the methods that add modules: fit, evaluate, predict, search, resume, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from fewtune.errors import TuningError
from fewtune.files import save_state
from fewtune.tasks import evaluate, fit, load_task, predict
from fewtune.training.trainer import SaveEpochs
from runs import coloured_folder, fewtune, tiny_recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "adapter": {"bottleneck": 4},
    "lora": {"rank": 2},
    "vpt-shallow": {"prompts": 3},
    "vpt-deep": {"prompts": 3},
    "ssf": {},
    "spt-adapter": {"spt_budget": 8_000, "rank": 2},
    "spt-lora": {"spt_budget": 8_000, "rank": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every method."""
    folder = tmp_path_factory.mktemp("runs")
    for method, settings in SETTINGS.items():
        fit(tiny_recipe(images, method=method, epochs=2, lr=1e-2, ema=0.9, **settings), folder / method)
    return folder


@pytest.mark.parametrize("method", SETTINGS)
def test_the_task_file_alone_evaluates_and_predicts(method: str, runs: Path, images: Path) -> None:
    file, metrics = runs / method / "delta.safetensors", json.loads((runs / method / "metrics.json").read_text())
    got = evaluate(file, str(images), test_fraction=0.25)
    assert got.report.accuracy.value == metrics["test"]["accuracy"]["value"]
    assert got.report.calibration_error == pytest.approx(metrics["test"]["calibration_error"])
    assert len(predict(file, [images / "class0"])) == 12
    task = load_task(file)
    assert task.delta.metadata["method"] == method
    assert task.delta.trained == metrics["trained"]  # type: ignore[union-attr]


@pytest.mark.parametrize("method", SETTINGS)
def test_checkpoints_are_compact_and_plain(method: str, runs: Path) -> None:
    trained = json.loads((runs / method / "metrics.json").read_text())["trained"]
    state = torch.load(runs / method / "checkpoint.ckpt", weights_only=True)
    held = [tensor for group in ("added", "values") for tensor in state["state_dict"][group].values()]
    assert sum(tensor.numel() for tensor in held) == trained
    # values, their averages, the best ones, and Adam's two moments: five numbers for each trained one
    assert (runs / method / "checkpoint.ckpt").stat().st_size < 5 * 4 * trained + 200_000


@pytest.mark.parametrize("method", SETTINGS)
def test_an_exported_task_is_a_plain_checkpoint_or_says_that_it_cannot_be(
    method: str, runs: Path, tmp_path: Path
) -> None:
    file, out = runs / method / "delta.safetensors", tmp_path / "plain.safetensors"
    if method not in ("lora", "ssf", "spt-lora"):
        with pytest.raises(TuningError, match=f"{method} adds modules"):
            load_task(file).plain_state_dict()
        return
    save_state(load_task(file).plain_state_dict(), out)
    plain = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    plain.load_state_dict(load_file(out), strict=True)
    task = load_task(file)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), task.backbone.model(x), rtol=1e-4, atol=1e-5)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["adapter", "lora", "vpt-deep", "ssf", "spt-lora"])
def test_a_run_that_was_cut_off_goes_on_to_the_very_same_numbers(
    method: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(images, method=method, epochs=3, lr=1e-2, ema=0.9, drop_path=0.1, **SETTINGS[method])
    fit(recipe, tmp_path / "whole")
    save = SaveEpochs.on_train_epoch_end

    def once(self: SaveEpochs, trainer: Any, module: Any) -> None:
        save(self, trainer, module)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SaveEpochs, "on_train_epoch_end", once)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut" / "metrics.json").exists()
    fit(None, tmp_path / "cut", resume=True)
    for name in ("delta.safetensors", "test_predictions.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "spt-lora"])
def test_search_tries_learning_rates_alone(method: str, images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        images, method=method, epochs=2, search_lr=(1e-3, 1e-2), search_epochs=1, **SETTINGS[method]
    )  # fmt: skip
    result = fit(recipe, tmp_path / "run", search=True)
    lines = (tmp_path / "run" / "search.csv").read_text().strip().splitlines()
    assert len(lines) == 2 + ("lr" in lines[0])
    assert result.metrics["trained"] > 0


def test_the_command_line_works_from_the_task_file(runs: Path, images: Path) -> None:
    file = runs / "lora" / "delta.safetensors"
    shown = fewtune("delta", "inspect", file)
    assert shown.returncode == 0, shown.stderr
    assert "method      lora" in shown.stdout
    assert "lora: rank=2" in shown.stdout
    facts = json.loads(fewtune("delta", "inspect", file, "--json").stdout)
    assert facts["trained"] == json.loads((runs / "lora" / "metrics.json").read_text())["trained"]
    refused = fewtune("delta", "export", runs / "vpt-deep" / "delta.safetensors", "--out", runs / "x.safetensors")
    assert refused.returncode == 2
    assert refused.stderr.strip().count("\n") == 0
    assert "no plain checkpoint" in refused.stderr


def test_a_method_that_does_not_know_the_model_is_one_line_and_status_two(images: Path, tmp_path: Path) -> None:
    done = fewtune(
        "fit", "--model", "timm:test_resnet", "--data", images, "method=vpt-deep", "pretrained=false",
        "epochs=1", "accelerator=cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2
    assert "vpt-deep finds no block that it knows in ResNet; it knows ViT, Swin and ConvNeXt" in done.stderr
