"""load_data by name: torchvision, Hugging Face, the demo sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import images
from fewtune.assets import TEXTILE, is_cached
from fewtune.data import load_data
from images import fails


def test_digits() -> None:
    data = load_data("demo:digits")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 719, "val": 180, "test": 898}
    image, label = data.train[0]
    assert (image.size, image.mode, data.num_classes) == ((8, 8), "RGB", 10)
    assert 0 <= label < 10
    assert np.asarray(image).max() > 200
    data.check()


def test_textile() -> None:
    if not is_cached(TEXTILE) and not os.environ.get("FEWTUNE_TEST_DOWNLOADS"):
        pytest.skip("conformal-clip-data is not in the cache; FEWTUNE_TEST_DOWNLOADS=1 fetches it")
    data = load_data("demo:textile", limit_train=300, limit_test=100)
    assert data.class_names == ("global", "local", "nominal")
    assert data.test.counts(3) == [25, 25, 50]  # type: ignore[union-attr]
    assert data.train[0][0].size == (250, 250)


def test_torchvision_with_validation_split(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    for name in ("banded", "dotted"):
        for i in range(6):
            images.plain(base / "images" / name / f"{name}_{i}.jpg", images.RED, size=4)
    (base / "labels").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"{c}/{c}_{2 * number + i}.jpg" for c in ("banded", "dotted") for i in range(2)]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines))
    data = load_data(f"torchvision:DTD?root={tmp_path}")
    assert data.class_names == ("banded", "dotted")
    assert [split.labels for split in data.splits.values()] == [[0, 0, 1, 1]] * 3
    assert data.test[0][0].mode == "RGB"  # type: ignore[index]


def test_torchvision_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision

    fails("torchvision:CIFAR11", "did you mean 'CIFAR10'")
    fails("torchvision:CIFAR10?folder=x", 'unknown option "folder"', "root")

    def offline(*_: object, **__: object) -> None:
        raise OSError("<urlopen error> at https://secret.example/simple")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    assert "secret" not in fails(f"torchvision:CIFAR10?root={tmp_path}", "could not be downloaded", "network")


def test_hugging_face_data_set_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])})
    parts = {
        split: datasets.Dataset.from_dict(
            {"picture": [images.picture()] * n, "kind": [i % 2 for i in range(n)]}, features=features
        )
        for split, n in (("train", 6), ("validation", 4), ("test", 2))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    data = load_data(f"hf:{tmp_path / 'set'}")
    assert data.class_names == ("no", "yes")
    assert [split.labels for split in data.splits.values()] == [[0, 1] * 3, [0, 1] * 2, [0, 1]]
    assert images.corners(data.val[1][0])[0] == images.RED  # type: ignore[index]
    fails(f"hf:{tmp_path / 'set'}?label=colour", 'no column "colour"', "picture, kind")


def test_demo_names() -> None:
    fails("demo:textil", "did you mean 'textile'?")
