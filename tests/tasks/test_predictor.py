"""One loaded backbone for many tasks, of any number of classes and of any method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewtune
from fewtune.delta import applied
from fewtune.errors import DeltaError
from fewtune.files import save_state
from fewtune.models import Backbone, load_backbone
from fewtune.tasks import fit, predict
from runs import coloured_folder, tiny_recipe

TASKS = {"bias": 3, "lora": 2, "gps": 4}
"""Method -> the number of classes of its task."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with a head of its own, and three tasks of it."""
    root = tmp_path_factory.mktemp("tasks")
    save_state(
        load_backbone("timm:test_vit", num_classes=5, image_size=32, pretrained=False).model.state_dict(),
        root / "vit.safetensors",
    )
    model = {
        "model": f"file:{root / 'vit.safetensors'}",
        "arch": "timm:test_vit",
        "pretrained": True,
        "epochs": 1,
        "lr": 0.01,
    }
    for method, classes in TASKS.items():
        data = coloured_folder(root / f"photos-{method}", classes=classes, each=8)
        fit(tiny_recipe(data, method=method, **model), root / method)
    return root


def task_file(root: Path, method: str) -> Path:
    return root / method / "delta.safetensors"


def backbone(root: Path) -> Backbone:
    return load_backbone(
        f"file:{root / 'vit.safetensors'}", num_classes=None, architecture="timm:test_vit", image_size=32
    )


def alone(root: Path, method: str) -> list[dict]:
    return predict(task_file(root, method), [root / "photos-gps"], accelerator="cpu")


def test_a_predictor_answers_each_task_as_the_task_alone(root: Path) -> None:
    predictor = fewtune.Predictor(task_file(root, "gps"))
    plain = {id(p) for n, p in predictor.loaded.plain.model.named_parameters() if not n.startswith("head")}
    for method in ("gps", "lora", "bias", "lora", "gps"):
        predictor.swap(task_file(root, method))
        rows = predictor.predict([root / "photos-gps"], accelerator="cpu")
        assert rows == alone(root, method)
        assert sum(key.startswith("p(") for key in rows[0]) == TASKS[method]
        shown = predictor.loaded.plain.model.named_parameters()
        assert {id(p) for n, p in shown if not n.startswith("head")} == plain  # the weights were not loaded again


def test_a_loaded_backbone_is_reused_and_is_plain_again_in_the_end(root: Path) -> None:
    loaded = backbone(root)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    first = fewtune.load_task(task_file(root, "bias"), backbone=loaded)
    assert first.backbone.model is loaded.model
    second = fewtune.load_task(task_file(root, "gps"), backbone=first.plain)
    assert second.backbone.model is loaded.model
    assert second.class_names == ("class0", "class1", "class2", "class3")
    with pytest.raises(DeltaError, match="another task was put into this backbone"):
        predict_with(first, root)
    assert predict_with(second, root) == alone(root, "gps")
    third = fewtune.load_task(task_file(root, "lora"), backbone=second.plain)
    with pytest.raises(DeltaError, match="another task was put into this backbone"):
        predict_with(second, root)
    assert predict_with(third, root) == alone(root, "lora")
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def predict_with(task: object, root: Path) -> list[dict]:
    from fewtune.classification.predict import predict as of_classes

    return of_classes(task, [root / "photos-gps"], accelerator="cpu")


@pytest.mark.parametrize("method", ["gps", "lora"])
def test_a_task_of_another_backbone_is_refused_and_the_present_one_stays(root: Path, method: str) -> None:
    other = backbone(root)
    with torch.no_grad():
        other.model.blocks[0].mlp.fc1.weight.mul_(1.1)
        other.model.blocks[0].norm1.weight.add_(1)
    with pytest.raises(DeltaError, match="another backbone"):
        fewtune.load_task(task_file(root, method), backbone=other)
    predictor = fewtune.Predictor(task_file(root, "bias"))
    model = predictor.loaded.plain.model
    with torch.no_grad():
        model.pos_embed.add_(1)
    with pytest.raises(DeltaError, match="another backbone"):
        predictor.swap(task_file(root, method))
    assert applied(model) is predictor.loaded.delta
    assert predictor.predict([root / "photos-gps"], accelerator="cpu")


def test_the_names_need_no_library_until_they_are_used() -> None:
    code = (
        "import sys, fewtune; assert not {'timm', 'pydantic', 'PIL'} & sys.modules.keys()\n"
        "sys.modules['pydantic'] = None\n"
        "try: fewtune.load_task\n"
        "except fewtune.FewtuneError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "pip install 'fewtune[train]'" in said
