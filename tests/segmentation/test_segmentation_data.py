"""Images with masks: splits, the test set by rule, leaks, joint transforms, and what is wrong in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import miniatures
from fewtune.cli.app import app
from fewtune.data import load_masks, open_mask
from fewtune.data.mask_transforms import Input, Joint, mask_at
from fewtune.errors import DataError
from fewtune.training.loaders import image_loader
from masks import mask_folder, scene, write_scene

DATA = Path(os.environ.get("FEWTUNE_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
KVASIR = DATA / "kvasir_seg_256.zip"


@dataclass(frozen=True)
class Spec:
    image_size: int = 24
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    interpolation: str = "bilinear"


def refused(folder: Path | str, *words: str, **options: Any) -> None:
    """Loading and checking raises one DataError of one line with all the words."""
    with pytest.raises(DataError) as caught:
        load_masks(folder, **options).check()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("suffixes", [(".png", ".png"), (".jpg", ".jpg"), (".jpg", ".png")])
def test_folder_of_pairs(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    data = load_masks(mask_folder(tmp_path / "d", 12, suffixes=suffixes), test_fraction=0.25, val_fraction=0.2)
    data.check()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "val": 2, "test": 3}
    names = [name for split in data.splits.values() for name in split.names]
    assert len(set(names)) == 12
    split = data.train
    number = int(split.images[0].stem[-2:])
    truth = scene(number, width=36 + number % 5, height=28 + number % 3)[1]
    assert split.mask(0).dtype == np.bool_
    assert (split.mask(0) != truth).mean() < 0.01
    assert split[0][0].size == truth.shape[::-1]


def test_the_test_set_follows_from_the_names_alone(tmp_path: Path) -> None:
    folder = mask_folder(tmp_path / "d", 12)
    order = sorted(
        (path.stem for path in (folder / "images").iterdir()), key=lambda s: hashlib.sha256(s.encode()).hexdigest()
    )
    tests, vals = set(), set()
    for seed in range(3):
        data = load_masks(folder, seed=seed, test_fraction=0.25)
        assert data.test is not None
        assert data.val is not None
        assert [path.stem for path in data.test.images] == order[-3:]
        tests.add(tuple(data.test.names))
        vals.add(tuple(data.val.names))
        assert not {*data.test.names} & {*data.train.names, *data.val.names}
    assert len(tests) == 1
    assert len(vals) > 1
    again = load_masks(folder, seed=2, test_fraction=0.25)
    assert again.val is not None
    assert tuple(again.val.names) in vals
    few = load_masks(folder, test_fraction=0.25, limit_train=4, limit_test=2)
    assert [len(split) for split in few.splits.values()] == [3, 1, 2]


def test_folders_of_splits(tmp_path: Path) -> None:
    for first, (name, count) in enumerate({"train": 4, "validation": 2, "test": 3}.items()):
        mask_folder(tmp_path / name, count, first=10 * first)
    data = load_masks(tmp_path)
    data.check()
    assert [len(split) for split in data.splits.values()] == [4, 2, 3]
    assert data.train.names[0] == "train/images/scene00.png"


def test_kvasir_by_its_key(tmp_path: Path) -> None:
    miniatures.build("kvasir-seg", tmp_path, train=22, test=3)
    data = load_masks(f"task:kvasir-seg?root={tmp_path}", val_fraction=0.0)
    data.check()
    assert data.test is not None
    everything = [*data.train.images, *data.test.images]
    by_hash = sorted(everything, key=lambda path: hashlib.sha256(path.stem.encode()).hexdigest())
    assert [path.name for path in data.test.images] == [path.name for path in by_hash[-3:]]
    counts = ["--counts", f"train={len(data.train)},test=3"]
    checked = CliRunner().invoke(app, ["data", "check", "kvasir-seg", "--data", str(tmp_path), "--json", *counts])
    assert checked.exit_code == 0, checked.stdout
    assert json.loads(checked.stdout)["faults"] == []
    refused("task:vtab-dtd?root=.", "has no masks")


@pytest.mark.data
def test_the_real_kvasir(tmp_path: Path) -> None:
    """998 of its 1,000 images: 878 and 120 by the rule, no leak, masks of polyps and not of everything."""
    if not KVASIR.exists():
        pytest.skip(f"Kvasir-SEG is not at {KVASIR}; FEWTUNE_TEST_DATA says where")
    with zipfile.ZipFile(KVASIR) as archive:
        archive.extractall(tmp_path)
    data = load_masks(f"task:kvasir-seg?root={tmp_path}", val_fraction=0.1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 790, "val": 88, "test": 120}
    data.check_leaks()
    assert data.test is not None
    some = data.test.subset(range(0, 120, 10))
    some.check()
    assert all(0.001 < some.mask(index).mean() < 0.9 for index in range(len(some)))


def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    good = mask_folder(tmp_path / "good", 6)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    other_size = broken("other size")
    Image.new("L", (7, 5)).save(other_size / "masks/scene02.png")
    refused(other_size, "scene02.png", "7 x 5", "expected the same size")
    no_mask = broken("no mask")
    (no_mask / "masks/scene03.png").unlink()
    refused(no_mask, "images/scene03.png has no mask", "masks/scene03.*")
    no_image = broken("no image")
    (no_image / "images/scene01.png").unlink()
    refused(no_image, "masks/scene01.png has no image", "images/scene01.*")
    cut_short = broken("cut short")
    content = (cut_short / "masks/scene04.png").read_bytes()
    (cut_short / "masks/scene04.png").write_bytes(content[: len(content) // 2])
    refused(cut_short, "masks/scene04.png", "cut short")
    twice = broken("twice")
    shutil.copy(twice / "masks/scene00.png", twice / "masks/scene00.jpg")
    refused(twice, "scene00.jpg", "scene00.png", "one name")
    refused(tmp_path / "absent", "absent", "images/ and masks/")
    refused(tmp_path, "holds no images with masks")
    (tmp_path / "bare/images").mkdir(parents=True)
    (tmp_path / "bare/masks").mkdir()
    refused(tmp_path / "bare", "holds no images")
    refused(mask_folder(tmp_path / "one", 1), "too few")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 1), "largest grey value is 1; multiply masks of 0 and 1 by 255"),
        ((0, 2), "multiply masks of 0 and 2 by 127"),
        ((0, 100), "largest grey value is 100"),
        ((100, 255), "neither near 0 nor near 255"),
        ((0, 140), "mostly 140"),
    ],
)
def test_grey_masks_are_refused(tmp_path: Path, values: tuple[int, int], words: str) -> None:
    folder = mask_folder(tmp_path, 4)
    mask = scene(0, 36, 28)[1]
    Image.fromarray(np.where(mask, values[1], values[0]).astype(np.uint8)).save(folder / "masks/scene00.png")
    refused(folder, "masks/scene00.png is no mask", words)


def test_smoothed_edges_and_other_modes_are_masks(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    smooth = Image.fromarray(mask).resize((61, 61), Image.Resampling.BILINEAR)
    smooth.save(tmp_path / "smooth.png")
    assert ((np.asarray(smooth) > 32) & (np.asarray(smooth) < 223)).any()
    Image.fromarray(mask).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(mask).convert("RGB").save(tmp_path / "colour.png")
    Image.fromarray(mask.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros_like(mask)).save(tmp_path / "empty.png")
    for name in ("bits", "colour", "deep"):
        assert (open_mask(tmp_path / f"{name}.png") == (mask > 0)).all(), name
    assert open_mask(tmp_path / "smooth.png").sum() == pytest.approx((mask > 0).sum() * (61 / 64) ** 2, rel=0.05)
    assert not open_mask(tmp_path / "empty.png").any()


def test_leaks_are_found_by_content(tmp_path: Path) -> None:
    """A test image under another name among the training images, as in the published code's folders."""
    for first, (name, count) in enumerate({"train": 4, "val": 2, "test": 3}.items()):
        mask_folder(tmp_path / name, count, first=10 * first)
    load_masks(tmp_path).check()
    write_scene(tmp_path / "val", "another name", 20, width=36 + 20 % 5, height=28 + 20 % 3)
    refused(tmp_path, "test/images/scene20.png (test) is the same image as val/images/another name.png")


def test_image_and_mask_are_flipped_together() -> None:
    spec = Spec()
    image, mask = scene(3, 40, 30)
    joint = Joint("flip", spec)
    plain = Joint("plain", spec)(image, mask)
    assert [tuple(t.shape) for t in plain] == [(3, 24, 24), (1, 24, 24)]
    assert all(type(t) is torch.Tensor and t.dtype == torch.float32 for t in plain)
    assert set(plain[1].unique().tolist()) == {0.0, 1.0}
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        pair = joint(image, mask)
        turned = not torch.equal(pair[0], plain[0])
        expected = [t.flip(-1) for t in plain] if turned else list(plain)
        # the image is resized before it is turned, so equality is exact
        assert torch.equal(pair[0], expected[0])
        assert torch.equal(pair[1], expected[1])
        seen.add(turned)
    assert seen == {True, False}
    inside, outside = (plain[0].mean(0)[plain[1][0] == value].mean().item() for value in (1, 0))
    assert inside > outside + 1  # the mask lies on the bright ellipse
    tensor, size = Input(spec)(image)
    assert torch.equal(tensor, plain[0])
    assert size.tolist() == [30, 40]


@pytest.mark.parametrize("size", [15, 24, 97, 200])
def test_a_resized_mask_stays_where_it_was(size: int) -> None:
    """The nearest pixel, which torchvision takes, moves it by half a pixel of the new size."""
    mask = np.zeros((90, 120), dtype=bool)
    mask[30:60, 40:80] = True
    small = mask_at(mask, (size, size))[0]
    assert set(small.unique().tolist()) == {0.0, 1.0}
    place = (torch.arange(size) + 0.5) / size
    centre = [float((small.sum(axis) * place).sum() / small.sum()) for axis in (0, 1)]
    assert centre == pytest.approx([0.5, 0.5], abs=0.05 / size)
    assert float(small.mean()) == pytest.approx(mask.mean(), rel=2.5 / (size / 3))


def test_loader_gives_batches_and_draws_by_epoch(tmp_path: Path) -> None:
    split = load_masks(mask_folder(tmp_path, 6), val_fraction=0.0).train.with_transform(Joint("flip", Spec()))
    first, again, other = (list(image_loader(split, 4, seed=1, epoch=epoch, shuffle=True)) for epoch in (0, 0, 1))
    assert [tuple(batch[1].shape) for batch in first] == [(4, 1, 24, 24), (2, 1, 24, 24)]
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(one[0], two[0]) for one, two in zip(first, other, strict=True))
