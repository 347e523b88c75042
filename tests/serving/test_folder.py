"""A bank follows a folder: files that appear, change and go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from banks import BACKBONES, applied_alone, images, task
from fewtune.errors import DataError
from fewtune.serving import TaskBank, TaskFolder


def test_files_appear_change_and_go(tmp_path: Path) -> None:
    model = BACKBONES["vit"]()
    bank, batch = TaskBank(model), images(1)
    folder = TaskFolder(bank, tmp_path)
    assert folder.refresh() == {}
    task(model, seed=0, classes=2).save(tmp_path / "a.safetensors")
    task(model, seed=1, classes=4).save(tmp_path / "b.safetensors")
    assert folder.refresh() == {}
    assert bank.tasks() == ("a", "b")
    (new := task(model, k=5, seed=2, classes=5)).save(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").unlink()
    folder.refresh()
    assert bank.tasks() == ("a",)
    torch.testing.assert_close(bank.logits(batch, "a")[0], applied_alone(model, new, batch)[0], rtol=1e-5, atol=1e-4)


def test_a_damaged_file_is_told_once_and_leaves_the_good_one(tmp_path: Path) -> None:
    model = BACKBONES["vit"]()
    bank, file = TaskBank(model), tmp_path / "a.safetensors"
    bank.add("own", task(model, seed=7))
    folder = TaskFolder(bank, tmp_path)
    task(model).save(file)
    folder.refresh()
    before = bank.logits(images(1), "a")[0]
    file.write_bytes(file.read_bytes()[:-40])
    wrong = folder.refresh()
    assert list(wrong) == ["a"]
    assert "damaged" in wrong["a"] or "truncated" in wrong["a"]
    assert folder.refresh() == {}
    assert torch.equal(bank.logits(images(1), "a")[0], before)
    file.unlink()
    folder.refresh()
    assert bank.tasks() == ("own",)


def test_it_is_followed_while_the_bank_runs(tmp_path: Path) -> None:
    model = BACKBONES["vit"]()
    bank = TaskBank(model)
    folder = TaskFolder(bank, tmp_path)
    folder.start(seconds=0.02)
    try:
        task(model).save(tmp_path / "late.safetensors")
        ends = time.monotonic() + 60
        while bank.tasks() != ("late",) and time.monotonic() < ends:
            time.sleep(0.02)
    finally:
        folder.stop()
    assert bank.tasks() == ("late",)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of task files"):
        TaskFolder(TaskBank(BACKBONES["vit"]()), tmp_path / "none")
