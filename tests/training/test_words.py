"""The first and last words of a run: what is told, what is not, and what a run that did not end leaves."""

from __future__ import annotations

import io
import json
import logging
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import fewtune.training.fit as fitting
from fewtune.classification.learner import Classifier
from fewtune.cli import main
from fewtune.errors import ConfigError, ModelError, SelectionError
from fewtune.files import write_bytes
from fewtune.tasks import fit
from fewtune.training.trainer import EpochBar, TimeEstimate
from runs import arguments, coloured_folder, fewtune, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("words") / "images", each=8)


def test_lightnings_hints_do_not_reach_users(images: Path, tmp_path: Path) -> None:
    """Batch normalisations with frozen statistics are in evaluation mode by design."""
    done = fewtune("fit", *arguments(images, model="timm:test_resnet", epochs=1, importance="magnitude"),
                   "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "eval mode" not in done.stderr
    assert "Errno" not in done.stderr


def test_ctrl_c_says_how_to_go_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, seen = Classifier.training_step, []

    def interrupted(self: Any, *args: Any) -> Any:
        seen.append(self.current_epoch)
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, *args)

    out = tmp_path / "run"
    monkeypatch.setattr(Classifier, "training_step", interrupted)
    command = ["fewtune", "fit", *arguments(images, epochs=2, importance="magnitude"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with caplog.at_level(logging.INFO, "fewtune"), pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 130
    assert f"fewtune fit --out {out} --resume" in caplog.text
    monkeypatch.setattr(Classifier, "training_step", step)
    _resumed_counts_all_parts(out)


def _resumed_counts_all_parts(out: Path) -> None:
    import torch

    state = torch.load(out / "checkpoint.ckpt", weights_only=True)
    state["fewtune"]["seconds"] = 1000.0
    torch.save(state, out / "checkpoint.ckpt")
    assert fit(None, out, resume=True).metrics["seconds"] > 1000


def test_a_refused_run_leaves_no_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise SelectionError("nothing is selected")

    recipe, out = tiny_recipe(images, epochs=1, importance="magnitude"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "make_tuner", refuse)
        with pytest.raises(SelectionError):
            fit(recipe, out)
    assert not out.exists()
    assert fit(recipe, out).folder.metrics.exists()


def test_a_typo_in_the_model_is_told_before_the_data_is_read(tmp_path: Path) -> None:
    for model in ("timm:test_vti", "torchvision:resnet19", "demo:vit-smal"):
        with pytest.raises(ModelError, match="did you mean"):
            fit(tiny_recipe(tmp_path / "nowhere", model=model), tmp_path / "run")


def test_a_full_disk_names_the_path(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_bytes(tmp_path / "large", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "large")
    assert list(tmp_path.iterdir()) == []


def test_the_bar_counts_from_1_and_the_estimate_has_a_line_of_its_own() -> None:
    bar, written = EpochBar(), io.StringIO()
    trainer: Any = SimpleNamespace(
        max_epochs=5, current_epoch=0, num_training_batches=10, is_global_zero=True, progress_bar_callback=bar
    )
    bar._trainer = trainer
    assert bar._get_train_description(0) == "epoch 1 of 5"
    bar.progress = SimpleNamespace(console=Console(file=written))  # type: ignore[assignment]
    estimate = TimeEstimate()
    for _ in range(4):
        estimate.on_train_batch_start()
        estimate.on_train_batch_end(trainer)
    assert written.getvalue().startswith("about ")
    assert written.getvalue().endswith("for 50 steps and 5 epochs in all\n")


def test_settings_that_mean_something_else_than_they_say(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fewtune"):
        result = fit(tiny_recipe(images, epochs=1, k=1.5, importance="magnitude"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"image_size=40 is no multiple .* of 16 px; take 32 or 48"):
        fit(tiny_recipe(images, image_size=40), tmp_path / "other")
    assert "k=1.5: 1 connections of every neuron, and one more of the 50 % of the neurons" in caplog.text
    assert json.loads(result.folder.metrics.read_text())
