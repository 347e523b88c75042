"""`quantise=` of a recipe, from a run to what is done with its task file."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fewtune
from banks import BACKBONES, applied_alone, images
from fewtune.classification.checkpoints import apply_to_checkpoint, revert_checkpoint
from fewtune.errors import ConfigError, MissingExtra, TuningError
from fewtune.files import save_state
from fewtune.models import load_backbone
from fewtune.models.checkpoint import read_state
from fewtune.quantised import Overlay, dequantised, quantise, scheme
from fewtune.serving import TaskBank
from fewtune.tasks import evaluate, fit, load_task
from runs import coloured_folder, tiny_recipe
from runs import fewtune as fewtune_command

INT8 = "int8, one scale a row"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def recipe(data: Path, **changes: object):
    pytest.importorskip("torchao", reason="torchao is not installed")
    return tiny_recipe(data, **{"quantise": "int8", "epochs": 2, "report": False, **changes})


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    return fit(recipe(folder), tmp_path_factory.mktemp("runs") / "run")


def test_the_task_file_makes_the_same_model_again(folder: Path, run) -> None:
    assert "quantise: int8" in run.folder.config.read_text()
    delta = fewtune.load_delta(run.folder.delta)
    assert set(delta.quantised.values()) == {INT8}
    assert delta.metadata["backbone"]["arguments"]["quantise"] == "int8"
    loaded = load_task(run.folder.delta)
    model = loaded.backbone.model
    kept = {name: scheme(p) for name, p in model.named_parameters() if isinstance(p, Overlay)}
    assert kept == delta.quantised
    assert not any("head" in name for name in kept)
    assert evaluate(run.folder.delta, str(folder)).to_json()["accuracy"] == run.metrics["test"]["accuracy"]
    assert f"quantised   {INT8}\n" in fewtune_command("delta", "inspect", run.folder.delta).stdout
    plain = load_backbone("timm:test_vit", num_classes=3, image_size=32, pretrained=False).model
    plain.load_state_dict(loaded.plain_state_dict())
    with torch.no_grad():
        assert torch.allclose(plain(images(2)), model(images(2)), atol=1e-5)


def test_checkpoints_in_full_precision(run, tmp_path: Path, caplog) -> None:
    plain = load_backbone("timm:test_vit", num_classes=3, image_size=32, pretrained=False).model
    before, tuned, after = (tmp_path / f"{name}.safetensors" for name in ("before", "tuned", "after"))
    save_state(plain.state_dict(), before)
    with caplog.at_level(logging.WARNING, "fewtune"):
        apply_to_checkpoint(run.folder.delta, before, tuned)
    assert "quantised weights that are in full precision here" in caplog.text
    delta, state = fewtune.load_delta(run.folder.delta), read_state(tuned)
    assert all(torch.equal(state[n].flatten()[delta.positions[n]], values) for n, values in delta.values.items())
    revert_checkpoint(run.folder.delta, tuned, after, before, None)
    ours, theirs = read_state(after), read_state(before)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "changes",
    [{"stages": 2}, {"method": "lora"}, {"reach": 2, "keep_prefix": "float32"}, {"units": "input", "noise": 1.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_goes_with_it(folder: Path, tmp_path: Path, changes: dict[str, object], monkeypatch) -> None:
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))
    done = fit(recipe(folder, **changes), tmp_path / "run")
    assert evaluate(done.folder.delta, str(folder)).to_json()["accuracy"] == done.metrics["test"]["accuracy"]


def test_what_does_not(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="is of int8, one scale a row, and only float numbers can be trained whole"):
        fit(recipe(folder, method="full"), tmp_path / "run")
    with pytest.raises(ConfigError, match="quantise: strategy=fsdp2 shares out float weights alone"):
        recipe(folder, strategy="fsdp2")
    with pytest.raises(ConfigError, match=r"quantise: .*int8"):
        recipe(folder, quantise="int3")


def test_segmenter(tmp_path: Path) -> None:
    from fewtune.segmentation.models import load_segmenter, segmenter_from_description

    pytest.importorskip("torchao", reason="torchao is not installed")
    options = {"pretrained": False, "image_size": 32, "quantise": "int8"}
    segmenter = load_segmenter("timm:test_vit", **options)
    again = segmenter_from_description(segmenter.describe())
    weights = {name: p for name, p in segmenter.model.named_parameters() if scheme(p) is not None}
    assert weights
    assert all(torch.equal(dequantised(p), dequantised(again.model.get_parameter(n))) for n, p in weights.items())


def _task(model: nn.Module, seed: int) -> fewtune.Delta:
    tuner = fewtune.attach(model, fewtune.select(fewtune.random_importance(model, seed=seed), k=1))
    with torch.no_grad():
        for value in tuner.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)))
    delta = tuner.delta()
    tuner.detach(keep=False)
    return delta


def test_bank_of_tasks_on_one_quantised_backbone() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model: nn.Module = quantise(BACKBONES["vit"](), "int8", ["head"])
    stored = {name: p for name, p in model.named_parameters() if scheme(p) is not None}
    deltas = {name: _task(model, seed) for seed, name in enumerate("ab")}
    bank = TaskBank(model)
    for name, delta in deltas.items():
        bank.add(name, delta)
    batch, asked = images(4), list("abba")
    answers = bank.logits(batch, asked)
    for i, name in enumerate(asked):
        torch.testing.assert_close(
            answers[i], applied_alone(model, deltas[name], batch[i : i + 1])[0], atol=1e-5, rtol=1e-5
        )
    exact = bank.logits(batch, "a", exact=True)
    assert torch.equal(torch.stack(exact), applied_alone(model, deltas["a"], batch))
    assert all(model.get_parameter(name) is weight for name, weight in stored.items())


def test_a_library_that_is_there_and_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchao 0.18 is with torch 2.9, and with it everything that imports it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("from torch.nn.functional import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    expected = "torchao cannot be imported (cannot import name 'no_such_name'"
    with pytest.raises(MissingExtra, match=re.escape(expected) + r".*--upgrade 'fewtune\[int8\]'"):
        quantise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "int8")
