"""Runs that are killed and resumed, and runs of two processes, by the command line as a user would."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from fewtune.tasks import fit
from fewtune.training.tuners import Share
from fewtune.training.work import Work
from runs import arguments, coloured_folder, fewtune, tiny_recipe

TIMEOUT = 240


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def _history(folder: Path) -> list[dict[str, float]]:
    """Without the seconds, which no two runs share."""
    entries = json.loads((folder / "history.json").read_text())
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def _kill_after(epochs: int, command: list[str], folder: Path) -> None:
    """Start a run and SIGKILL it as soon as so many epochs are finished, in the midst of the next one."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(TIMEOUT * 20):
            if (folder / "history.json").exists() and len(_history(folder)) >= epochs:
                break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed: raise its epochs"


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_very_same_numbers(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 12, "ema": 0.9, "mixup": 0.2, "drop_path": 0.2, "augment": "fgvc", "lr": 1e-3
    }  # fmt: skip
    fit(tiny_recipe(images, preset="paper", **settings), tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "fewtune", "fit", *arguments(images, **settings), "--out", str(killed)]
    _kill_after(4, command, killed)
    assert not (killed / "metrics.json").exists()
    selected = (killed / "selection.safetensors").stat().st_mtime_ns
    done = fewtune("fit", "--resume", "--out", killed, "--json")
    assert done.returncode == 0, done.stderr
    assert (killed / "selection.safetensors").stat().st_mtime_ns == selected
    assert _history(killed) == _history(tmp_path / "whole")
    for name in ("delta.safetensors", "test_predictions.csv"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert json.loads(done.stdout)["test"] == metrics["test"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(images: Path, tmp_path: Path) -> None:
    """Two gloo processes with batches of 4 against one with batches of 8: the same images in every step.

    Gradients are summed in another order, so values agree to 1e-4 of the largest, not bit for bit (by SGD: Adam
    divides rounding noise by itself where a gradient is zero, as that of a key's bias). The connections are chosen by
    magnitude, since a contrastive batch of 4 is not one of 8.
    """
    settings: dict[str, Any] = {
        "importance": "magnitude",
        "augment": "fgvc",
        "ema": 0.9,
        "optimizer": "sgd",
        "lr": 0.05,
    }
    one = fit(tiny_recipe(images, **settings), tmp_path / "one")
    two = tmp_path / "two"
    shared = [*arguments(images, **settings, devices=2, strategy="ddp"), "batch_size=4"]
    done = fewtune("fit", *shared, "--out", two, "--json")
    assert done.returncode == 0, done.stderr
    printed = done.stdout[done.stdout.index("{") :]  # torch 2.9's Gloo says before it on stdout that it is connected
    assert json.loads(printed)["trained"] == one.metrics["trained"]  # printed once, by one process
    states = [
        torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]["values"]
        for folder in (one.folder.path, two)
    ]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-4 * float(value.abs().max())), name
    for first, second in zip(_history(one.folder.path), _history(two), strict=True):
        assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_share_the_importance_pass(images: Path, tmp_path: Path) -> None:
    """By either strategy they choose the same: of two processes a mean, times two, is the sum to the bit."""
    chosen = []
    for strategy in ("ddp", "fsdp2"):
        out = tmp_path / strategy
        done = fewtune("fit", *arguments(images, epochs=1, devices=2, strategy=strategy), "--out", out)
        assert done.returncode == 0, done.stderr
        chosen.append(load_file(out / "selection.safetensors"))
    assert sum(t.numel() for t in chosen[0].values()) == 3136
    assert chosen[0].keys() == chosen[1].keys()
    assert all(torch.equal(tensor, chosen[1][name]) for name, tensor in chosen[0].items())


def test_where_weights_are_shared_out_a_copy_is_scored() -> None:
    """The model itself stays whole: what is selected is attached to it, before the strategy shards it in turn."""
    model, shared = torch.nn.Linear(2, 3), []
    work = cast("Work", SimpleNamespace(backbone=SimpleNamespace(model=model)))
    assert Share(work, torch.device("cpu")).scored_model() is model
    scored = Share(work, torch.device("cpu"), 2, 0, shared.append).scored_model()
    assert shared == [scored]
    assert scored is not model
    assert torch.equal(scored.weight, model.weight)  # type: ignore[arg-type]
