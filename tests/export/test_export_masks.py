"""Exported segmenters draw what the task draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from fewtune.data.mask_transforms import Input
from fewtune.errors import ConfigError
from fewtune.export import export_task
from fewtune.segmentation.models import Segmenter
from fewtune.tasks import fit, load_task
from masks import mask_folder, tiny_mask_recipe
from segmenters import saved_sam


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask_folder(tmp_path_factory.mktemp("scenes"), count=12)


def _task(data: Path, out: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "report": False}
    fit(tiny_mask_recipe(data, **{**settings, **changes}), out)
    return out / "delta.safetensors"


def _run(made: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What was exported, run by its own library."""
    if made.suffix == ".pt2":
        program = torch.export.load(made).module()
        return lambda images: program(images).detach()
    session = onnxruntime.InferenceSession(made)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _equal(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """To 1e-4 of the largest logit, where that is over 1."""
    torch.testing.assert_close(got, wanted, atol=tolerance * max(1.0, float(wanted.abs().max())), rtol=0)


@pytest.mark.parametrize(("to", "method"), [("onnx", "gps"), ("torch-export", "lora")])
def test_a_linear_decoder(to: str, method: str, data: Path, tmp_path: Path) -> None:
    file = _task(data, tmp_path / "run", method=method)
    made = export_task(file, to, tmp_path / ("task.onnx" if to == "onnx" else "task.pt2"))
    run, own = _run(made.out), load_task(file).backbone.model
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            _equal(run(images), own(images))


@pytest.mark.slow
def test_segment_anything(data: Path, tmp_path: Path) -> None:
    file = _task(data, tmp_path / "run", model=saved_sam(tmp_path / "sam"), image_size=None, method="bias")
    run = _run(export_task(file, "onnx", tmp_path / "task.onnx").out)
    images = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _equal(run(images), load_task(file).backbone.model(images))


def test_a_photograph_from_the_metadata_alone(data: Path, tmp_path: Path) -> None:
    """As someone does it who has the file, onnxruntime and Pillow, whose resizing rounds to 8 bits."""
    file = _task(data, tmp_path / "run")
    made = export_task(file, "onnx", tmp_path / "task.onnx").out
    given = {entry.key: entry.value for entry in onnx.load(made).metadata_props}
    assert json.loads(given["class_names"]) == ["background", "object"]
    assert given["resize"] == "square"
    picture, side = Image.open(data / "images" / "scene03.png").convert("RGB"), int(given["image_size"])
    pixels = np.asarray(picture.resize((side, side), Image.Resampling[given["interpolation"].upper()])) / 255
    scaled = (pixels - np.array(json.loads(given["mean"]))) / np.array(json.loads(given["std"]))
    got = _run(made)(torch.from_numpy(scaled.transpose(2, 0, 1)[None].astype(np.float32)))
    task = load_task(file).backbone
    assert isinstance(task, Segmenter)
    with torch.no_grad():
        _equal(got, task.model(Input(task)(picture)[0][None]), tolerance=0.02)


def test_what_masks_have_not(data: Path, tmp_path: Path) -> None:
    file = _task(data, tmp_path / "run")
    with pytest.raises(ConfigError, match="take --to onnx or torch-export"):
        export_task(file, "checkpoint", tmp_path / "made")
    with pytest.raises(ConfigError, match="this task draws masks; leave --data out"):
        export_task(file, "onnx", tmp_path / "task.onnx", int8=True, data=str(data))
    assert export_task(file, "onnx", tmp_path / "small.onnx", int8=True).accuracy == {}
