"""Data sets of datasets that are read where they lie: from parquet files, row group by row group."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewtune.data.streams as streams
from fewtune import load_delta
from fewtune.data import load_data
from fewtune.data.sampling import WINDOW, block_order
from fewtune.errors import DataError
from fewtune.tasks import fit
from fewtune.training.loaders import image_loader
from runs import coloured_folder, tiny_recipe
from stopping import Stop

datasets = pytest.importorskip("datasets")
pytest.importorskip("pyarrow")


def written(folder: Path, images: Path, rows: int, split: str = "train") -> Path:
    """A parquet file of a folder of images, with so many rows a group, the classes mixed."""
    files = sorted(images.rglob("*.png"), key=lambda path: (path.stem, path.parent.name))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class0", "class1", "class2"])}
    )
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [int(file.parent.name[-1]) for file in files],
    }
    part = datasets.Dataset.from_dict(columns, features=features)
    folder.mkdir(exist_ok=True)
    part.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"), batch_size=rows)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images", each=12)


@pytest.fixture(scope="module")
def parquet(images: Path) -> Path:
    """36 images in 12 row groups."""
    return written(images.parent / "parquet", images, rows=3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The row groups that are read."""
    seen: list[Any] = []
    read = streams._group.__wrapped__

    def counted(path: str, group: int, column: str) -> list[Any]:
        seen.append(group)
        return read(path, group, column)

    monkeypatch.setattr(streams, "_group", lru_cache(WINDOW + 1)(counted))
    return seen


def test_it_is_the_set_that_is_loaded_whole(parquet: Path) -> None:
    whole, streamed = load_data(f"hf:{parquet}", seed=1), load_data(f"hf:{parquet}?stream", seed=1)
    assert whole.class_names == streamed.class_names == ("class0", "class1", "class2")
    for name, split in whole.splits.items():
        other = streamed.splits[name]
        assert (split.labels, split.names) == (other.labels, other.names)
        assert all(split.image(i).tobytes() == other.image(i).tobytes() for i in range(len(split)))


def test_an_epoch_reads_every_group_about_once_and_is_that_of_its_seed(parquet: Path, reads: list[Any]) -> None:
    train = load_data(f"hf:{parquet}?stream", val_fraction=0).train.with_transform(np.array)

    def epoch(number: int, seed: int = 0, **share: int) -> list[int]:
        loader = image_loader(train, 4, seed=seed, epoch=number, shuffle=True, **share)
        return [int(index) for _, _, indices in loader for index in indices]

    first = epoch(0)
    assert sorted(first) == list(range(36))
    assert len(reads) == 12
    assert first == epoch(0)
    assert len({tuple(order) for order in (first, epoch(1), epoch(0, seed=1), sorted(first))}) == 4
    halves = [epoch(0, world=2, rank=rank) for rank in range(2)]
    assert [index for pair in zip(*halves, strict=True) for index in pair] == first


def test_the_order_of_blocks() -> None:
    blocks = [number // 10 for number in range(400)]
    order = block_order(blocks, 3)
    assert sorted(order) == list(range(400))
    windows = [{blocks[index] for index in order[start : start + 80]} for start in range(0, 400, 80)]
    assert [len(window) for window in windows] == [WINDOW] * 5
    assert set.union(*windows) == set(range(40))
    assert len({blocks[index] for index in order[:10]}) > 3  # not one block after the other


def test_of_few_groups_training_is_that_of_the_set_loaded_whole(images: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "few", images, rows=6)
    for name in ("", "?stream"):
        fit(tiny_recipe(Path("x"), epochs=2).changed(data=f"hf:{folder}{name}"), tmp_path / f"run{name}")
    first, second = (load_delta(tmp_path / f"run{name}/delta.safetensors") for name in ("", "?stream"))
    assert first.selection() == second.selection()
    assert all(tensor.equal(second.new(name)) for name, tensor in {**first.values, **first.whole}.items())


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(parquet: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(Path("x"), epochs=3, augment="fgvc", workers=1).changed(data=f"hf:{parquet}?stream")
    fit(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "cut", callbacks=[Stop(1)])
    fit(None, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut/delta.safetensors").read_bytes() == (tmp_path / "whole/delta.safetensors").read_bytes()


def test_what_cannot_be_streamed_is_told(images: Path, parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not be found .* is the name right"):
        load_data(f"hf:{tmp_path / 'none'}?stream")
    with pytest.raises(DataError, match=r"expected a train split in parquet files, and it holds .*\.png"):
        load_data(f"hf:{images}?stream")
    with pytest.raises(DataError, match=r'no column "colour"; it has image, label'):
        load_data(f"hf:{parquet}?stream&label=colour")
    datasets.Dataset.from_dict({"a": [1], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match="which column holds the images"):
        load_data(f"hf:{tmp_path}?stream")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
        load_data(f"hf:{tmp_path}?stream")
