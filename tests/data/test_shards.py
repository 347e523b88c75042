"""Shards: the numbers of a folder, what a sample may be, what is told of a bad one."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from fewtune import load_delta
from fewtune.data import load_data
from fewtune.data.shards import write_shards
from fewtune.errors import DataError
from fewtune.tasks import fit
from images import picture
from runs import coloured_folder, tiny_recipe
from stopping import Stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images", each=10)


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    out = folder.parent / "shards"
    assert [path.name for path in write_shards(load_data(folder, val_fraction=0), out, images=12)] == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar",
    ]  # fmt: skip
    return out


def shard(path: Path, members: dict[str, bytes]) -> str:
    """A tar file with these members; its `wds:` name."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return f"wds:{path}"


def png() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format="PNG")
    return buffer.getvalue()


def test_training_from_shards_is_training_from_the_folder(folder: Path, shards: Path, tmp_path: Path) -> None:
    settings = {"epochs": 3, "augment": "fgvc", "workers": 1}
    fit(tiny_recipe(folder, **settings), tmp_path / "folder")
    recipe = tiny_recipe(Path("x"), **settings).changed(data=f"wds:{shards}")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "shards", callbacks=[Stop(1)])
    fit(None, tmp_path / "shards", resume=True)
    first, second = (load_delta(tmp_path / name / "delta.safetensors") for name in ("folder", "shards"))
    assert first.selection() == second.selection()
    for name, tensor in {**first.values, **first.whole}.items():
        assert tensor.equal(second.new(name)), name
    assert first.metadata["class_names"] == second.metadata["class_names"]


def test_the_same_images_in_the_same_order(folder: Path, shards: Path) -> None:
    plain, tarred = load_data(folder, test_fraction=0.2), load_data(f"wds:{shards}", test_fraction=0.2)
    assert plain.splits.keys() == tarred.splits.keys()
    for name, split in plain.splits.items():
        assert split.labels == tarred.splits[name].labels
        assert all(split.image(i).tobytes() == tarred.splits[name].image(i).tobytes() for i in range(len(split)))
    again = folder.parent / "again"
    write_shards(load_data(f"wds:{shards}", val_fraction=0), again, images=12)
    assert load_data(f"wds:{again}").class_names == plain.class_names


def test_splits_by_name_words_as_classes_and_addresses(tmp_path: Path) -> None:
    for name, label in (("train-0", "cat"), ("train-1", "dog"), ("val-0", "dog"), ("testing-0", "cat")):
        samples = {f"a/{i}.png": png() for i in range(3)} | {f"a/{i}.cls": label.encode() for i in range(3)}
        shard(tmp_path / f"{name}.tar", samples)
    data = load_data(f"wds:{tmp_path}")
    assert data.class_names == ("cat", "dog")
    assert {name: split.labels for name, split in data.splits.items()} == {
        "train": [0, 0, 0, 1, 1, 1], "val": [1, 1, 1], "test": [0, 0, 0],
    }  # fmt: skip
    braced = load_data(f"wds:{tmp_path}/train-{{0..1}}.tar", val_fraction=0)
    starred = load_data(f"wds:{tmp_path}/train-*.tar", val_fraction=0)
    assert braced.train.labels == starred.train.labels == [0, 0, 0, 1, 1, 1]
    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/bucket/train-{i}.tar", (tmp_path / f"train-{i}.tar").read_bytes())
    remote = load_data("wds:memory://bucket/train-{0..1}.tar", val_fraction=0)
    assert remote.train.labels == [0, 0, 0, 1, 1, 1]
    assert isinstance(remote.train.image(4), Image.Image)


def test_labels_in_json(tmp_path: Path) -> None:
    samples = {"0.png": png(), "0.json": b'{"label": 7}', "1.png": png(), "1.json": b'{"label": 3}'}
    data = load_data(shard(tmp_path / "a.tar", samples), val_fraction=0)
    assert (data.class_names, data.train.labels) == (("3", "7"), [1, 0])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"0.png": png()}, "sample 0 .* has no class"),
        ({"0.cls": b"1"}, "sample 0 .* has no image"),
        ({"0.png": png(), "0.json": b"[]"}, "0.json says no class"),
        ({"0.png": png(), "0.cls": b" "}, "expected a whole number or a word"),
        ({}, "holds no training images"),
    ],
)
def test_what_is_wrong_with_a_shard_is_told(members: dict[str, bytes], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        load_data(shard(tmp_path / "a.tar", members))


def test_shards_that_are_none(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="there are no shards"):
        load_data(f"wds:{tmp_path}")
    (tmp_path / "cut.tar").write_bytes((shards / "train-000000.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut\.tar cannot be read"):
        load_data(f"wds:{tmp_path / 'cut.tar'}")
    with pytest.raises(DataError, match=r"nowhere\.tar cannot be read"):
        load_data(f"wds:{tmp_path / 'nowhere.tar'}")
    damaged = shard(tmp_path / "bad.tar", {"0.png": png()[:40], "0.cls": b"0", "1.png": png(), "1.cls": b"1"})
    with pytest.raises(DataError, match=r"cannot read the image .*bad\.tar/0\.png"):
        load_data(damaged, val_fraction=0).train.image(0)
