"""Half precision is offered where it pays: transformers, in float32, on a CPU that multiplies bfloat16 faster.

Where it is on, attention multiplies all heads at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from fewtune.tasks import fit, prepare
from fewtune.training import precision
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize(
    ("changes", "speed", "offered"),
    [
        ({}, 2.0, True),
        ({}, 1.2, False),
        ({"precision": "bf16-mixed"}, 2.0, False),
        ({"model": "timm:test_convnext"}, 2.0, False),
    ],
)
def test_it_is_offered_where_it_pays(
    changes: dict[str, str], speed: float, offered: bool, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speed", lambda model: speed)
    line = precision.offer(prepare(tiny_recipe(images, **changes)))
    assert (line is not None) is offered
    assert line is None or "2.0 times as fast as float32: precision=bf16-mixed" in line


def test_the_processor_is_asked() -> None:
    assert precision.bfloat16_speed(nn.Conv2d(3, 4, 1)) == 0.0
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (precision.bfloat16_speed(timm.create_model("test_vit")) > 0) is supported


class Fused(Callback):
    """Whether torch's fused attention was allowed at each batch."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def on_train_batch_start(self, *_: object) -> None:
        self.seen.add(torch.backends.cuda.flash_sdp_enabled())


@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", False), ("32", True)])
def test_attention_in_bfloat16_multiplies_all_heads_at_once(
    precision: str, fused: bool, images: Path, tmp_path: Path
) -> None:
    look = Fused()
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    fit(tiny_recipe(images, precision=precision, epochs=1), tmp_path / "run", callbacks=[look])
    assert look.seen == {fused}
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() is before
