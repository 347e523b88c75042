"""The task file of a method that adds modules: saved, loaded into a fresh model, refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import fewtune
from fewtune.errors import DeltaError
from fewtune.methods import MethodFile, load_method_file, load_task_file
from methods_cases import PAIRS, output, plain_model, train, tuned


def saved(method: str, kind: str, path: Path) -> tuple[torch.Tensor, MethodFile]:
    """A trained task's outputs, and its file as it was saved."""
    tuner = tuned(method, kind)
    train(tuner, kind)
    task = tuner.delta({"note": ["of", 1]})
    task.save(path)
    return output(tuner.model, kind), task


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_fresh_model_with_the_file_gives_the_same_outputs(method: str, kind: str, tmp_path: Path) -> None:
    expected, task = saved(method, kind, tmp_path / "task.safetensors")
    loaded = load_task_file(tmp_path / "task.safetensors")
    assert isinstance(loaded, MethodFile)
    assert loaded.metadata == {"note": ["of", 1]}
    assert (loaded.trained, loaded.connections) == (task.trained, task.connections)
    model = plain_model(kind)
    tuner = loaded.apply(model)
    assert torch.equal(output(model, kind), expected)
    assert tuner.trained == task.trained
    assert tuner.delta(loaded.metadata).save(tmp_path / "again.safetensors") is None
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "task.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["adapter", "lora", "vpt-deep", "ssf", "spt-lora"])
def test_another_or_a_changed_backbone_is_refused_and_left_as_it_was(method: str, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    saved(method, "vit", path)
    task = load_method_file(path)
    changed = plain_model("vit")
    with torch.no_grad():
        changed.blocks[1].norm1.weight[3] += 0.5
    before = {name: tensor.clone() for name, tensor in changed.state_dict().items()}
    with pytest.raises(DeltaError, match=r"another backbone: blocks\.1\.norm1\.weight has other values"):
        task.apply(changed)
    assert all(torch.equal(before[name], tensor) for name, tensor in changed.state_dict().items())
    assert before.keys() == changed.state_dict().keys()
    for other in ("swin", "dinov2"):
        with pytest.raises(DeltaError, match=r"another backbone|head"):
            task.apply(plain_model(other))


@pytest.mark.parametrize("method", ["adapter", "lora", "vpt-deep", "ssf", "spt-lora"])
def test_a_model_with_another_number_of_classes_takes_the_tasks_head(method: str, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    expected, _ = saved(method, "vit", path)
    task = load_method_file(path)
    model = plain_model("vit")
    model.reset_classifier(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    beside, _ = task.beside(model)
    assert torch.equal(output(beside, "vit"), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    shared = {id(tensor) for tensor in model.parameters()} & {id(tensor) for tensor in beside.parameters()}
    assert len(shared) > len(before) / 2
    task.apply(model)
    assert torch.equal(output(model, "vit"), expected)
    assert model.num_classes == expected.shape[1]


@pytest.mark.parametrize("method", ["adapter", "spt-lora"])
def test_a_model_that_carries_a_task_already_is_refused(method: str, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    saved(method, "vit", path)
    model = plain_model("vit")
    task = load_method_file(path)
    task.apply(model)
    with pytest.raises(DeltaError, match=r"another backbone|attached"):
        task.apply(model)


def test_a_half_precision_copy_of_the_backbone_is_known(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    saved("adapter", "vit", path)
    model = plain_model("vit").to(torch.bfloat16)
    tuner = load_method_file(path).apply(model)
    assert {parameter.dtype for parameter in tuner.parameters()} == {torch.float32}


def test_damaged_foreign_and_newer_files_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    saved("lora", "vit", path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(content)
    with pytest.raises(DeltaError, match="truncated or altered"):
        load_task_file(tmp_path / "altered.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-20])
    for file in ("short.safetensors", "none.safetensors"):
        with pytest.raises(DeltaError, match=file):
            load_task_file(tmp_path / file)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fewtune"])
    tensors = safetensors.torch.load_file(path)
    for change, message in (({"version": 2}, "update fewtune"), ({"settings": {"rank": 9}}, "altered")):
        safetensors.torch.save_file(tensors, tmp_path / "new.safetensors", {"fewtune": json.dumps(header | change)})
        with pytest.raises(DeltaError, match=message):
            load_task_file(tmp_path / "new.safetensors")
    with pytest.raises(DeltaError, match="expected a fewtune-delta"):
        fewtune.load_delta(path)


def test_values_that_are_not_finite_are_not_saved() -> None:
    tuner = tuned("ssf", "vit")
    with torch.no_grad():
        tuner.parameters()[0][0] = torch.nan
    with pytest.raises(DeltaError, match="NaN"):
        tuner.delta()


def test_the_summary_counts_what_is_trained() -> None:
    tuner = tuned("lora", "vit")
    text = tuner.delta().summary()
    assert text.startswith("lora: rank=3, alpha=6.0\n")
    assert f"trained: {tuner.trained:,}; without the head" in text
