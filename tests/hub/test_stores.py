"""Task files of object stores, by fsspec's own memory and file systems."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

import fewtune
from fewtune.errors import ConfigError, DeltaError, MissingExtra
from fewtune.hub import resolve
from fewtune.stores import address, is_address
from fewtune.tasks import fit
from runs import coloured_folder, tiny_recipe
from runs import fewtune as command


def tiny_delta(value: float) -> fewtune.Delta:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    tuner = fewtune.attach(model, fewtune.select(fewtune.magnitude_importance(model, head="2"), k=1))
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.fill_(value)
    return tuner.delta()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a/b"), "s3://bucket/a/b"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("gs:/bucket/runs/", "gs://bucket/runs"),
        ("hf://org/name", None),
        ("C:/models/a", None),
        ("runs/a", None),
        ("wds:shards", None),
    ],
)
def test_addresses(path: str | Path, expected: str | None) -> None:
    assert is_address(path) == (expected is not None)
    if expected is not None:
        assert address(path) == expected


def test_a_task_file_of_a_store_is_read_and_read_anew_once_it_has_changed(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for value in (1.0, 2.0):
        tiny_delta(value).save(tmp_path / "delta.safetensors")
        memory.pipe("/bucket/run/delta.safetensors", (tmp_path / "delta.safetensors").read_bytes())
        for named in ("memory://bucket/run", Path("memory://bucket/run/delta.safetensors")):
            read = fewtune.load_delta(named)
            assert all(bool((new == value).all()) for new in read.values.values())
            assert str(resolve(named)) == "memory://bucket/run/delta.safetensors"


def test_what_is_wrong_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeltaError, match=r"^memory://bucket/none/delta\.safetensors does not exist$"):
        fewtune.load_delta("memory://bucket/none")
    with pytest.raises(DeltaError, match="Protocol not known: s9"):
        fewtune.load_delta("s9://bucket/a.safetensors")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra, match=r"s3fs.*fewtune\[stores\]"):
        fewtune.load_delta("s3://bucket/a.safetensors")


def test_commands_take_addresses_and_a_run_is_written_into_a_folder(tmp_path: Path) -> None:
    images = coloured_folder(tmp_path / "images")
    with pytest.raises(ConfigError, match="memory://bucket/run is in an object store"):
        fit(tiny_recipe(images), Path("memory://bucket/run"))
    run = fit(tiny_recipe(images, epochs=1), tmp_path / "run").folder
    given = ("predict", "--delta", f"file://{run.path}", "--json", images / "class0" / "00.png")
    done = command(*given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == command("predict", "--delta", run.delta, *given[3:]).stdout
    assert f"task file: file://{run.delta}" in done.stderr
