"""How images are decoded for prediction: in processes where that pays, and with errors of one line wherever it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fewtune.data import load_data
from fewtune.data.transforms import eval_transform
from fewtune.errors import DataError
from fewtune.models import load_backbone
from fewtune.training.loaders import decoding_workers, image_loader
from runs import coloured_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_wherever_it_is_decoded(workers: int, tmp_path: Path) -> None:
    root = coloured_folder(tmp_path / "images", classes=2, each=3)
    split = load_data(root, val_fraction=0).train
    (root / "class0" / "02.png").write_bytes(b"no image")
    backbone = load_backbone("timm:test_vit", num_classes=2, pretrained=False, image_size=32)
    loader = image_loader(split.with_transform(eval_transform("plain", backbone)), 2, workers=workers)
    with pytest.raises(
        DataError, match=r"^cannot read the image .*02\.png: it is not an image in a format .*$"
    ) as raised:
        list(loader)
    assert "\n" not in str(raised.value)


def test_processes_decode_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, images, expected in ((1, 10_000, 0), (4, 10_000, 4), (64, 10_000, 8), (4, 100, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, n=cores: set(range(n)), raising=False)
        assert decoding_workers(images, 32) == expected
