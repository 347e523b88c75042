"""load_data from a path: every format, every split, every mistake."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

import images
from fewtune.data import ImageData, Split, load_data
from fewtune.data.formats.vtab import CLASSES as VTAB_CLASSES
from fewtune.errors import DataError
from images import fails

COUNTS = {"cat": 10, "dog": 20, "größe": 30}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of three class folders."""
    return images.class_folders(tmp_path_factory.mktemp("data") / "pets", COUNTS, size=4)


def every_name(data: ImageData) -> list[str]:
    return sorted(name for split in data.splits.values() for name in split.names)


# Class folders


def test_class_folders_are_split_by_class(flat: Path) -> None:
    data = load_data(flat, val_fraction=0.2, test_fraction=0.5)
    assert data.class_names == ("cat", "dog", "größe")
    assert data.name == "pets"
    assert data.test is not None
    assert data.val is not None
    assert data.test.counts(3) == [5, 10, 15]
    assert data.val.counts(3) == [1, 2, 3]
    assert data.train.counts(3) == [4, 8, 12]
    assert every_name(data) == sorted(f"{name}/{i:03d}.png" for name, n in COUNTS.items() for i in range(n))
    image, label = data.train[0]
    assert image.size == (4, 4)
    assert data.train.names[0].startswith(data.class_names[label])


def test_seed_moves_validation_but_never_the_test_set(flat: Path) -> None:
    one, same, other = (load_data(flat, seed=seed, test_fraction=0.3) for seed in (0, 0, 1))
    assert one.train.names == same.train.names
    assert one.val.names == same.val.names  # type: ignore[union-attr]
    assert one.val.names != other.val.names  # type: ignore[union-attr]
    assert one.test.names == other.test.names  # type: ignore[union-attr]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, flat: Path) -> None:
    for path in sorted(flat.rglob("*.png"), reverse=True):
        (tmp_path / "pets" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "pets" / path.parent.name)
    assert load_data(tmp_path / "pets").train.names == load_data(flat).train.names


def test_no_validation_where_none_is_wanted(flat: Path) -> None:
    data = load_data(flat, val_fraction=0)
    assert (data.val, data.test) == (None, None)
    assert len(data.train) == 60
    assert "3 classes; images: 60 train" in data.summary()


def test_limits_keep_every_class(flat: Path) -> None:
    data = load_data(flat, test_fraction=0.5, limit_train=10, limit_test=6, val_fraction=0.2)
    assert len(data.train) + len(data.val) == 10  # type: ignore[arg-type]
    assert data.test.counts(3) == [1, 2, 3]  # type: ignore[union-attr]
    assert min(data.train.counts(3)) >= 1
    fails(flat, "limit_train=2", "3 classes", limit_train=2)


def test_own_split_folders_are_kept(tmp_path: Path) -> None:
    for split, count in (("Train", 6), ("validation", 3), ("test", 2)):
        images.class_folders(tmp_path / split, {"a": count, "b": count}, size=4)
    data = load_data(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "val": 6, "test": 4}
    assert all(name.startswith("test/") for name in data.test.names)  # type: ignore[union-attr]


def test_test_folder_may_lack_a_class_but_not_have_another(tmp_path: Path) -> None:
    images.class_folders(tmp_path / "train", {"apple": 3, "pear": 3}, size=4)
    images.class_folders(tmp_path / "test", {"pear": 2}, size=4)
    assert load_data(tmp_path).test.labels == [1, 1]  # type: ignore[union-attr]
    images.class_folders(tmp_path / "test", {"aple": 2}, size=4)
    fails(tmp_path, '"aple"', "did you mean 'apple'?")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    images.class_folders(tmp_path, {"train": 4, "bus": 4}, size=4)
    assert load_data(tmp_path).class_names == ("bus", "train")


def test_images_in_subfolders_of_a_class_count(tmp_path: Path) -> None:
    images.class_folders(tmp_path, {"a": 2, "b/2019": 2, "b/2020": 2}, size=4)
    assert load_data(tmp_path, val_fraction=0).train.counts(2) == [2, 4]


def test_folder_mistakes(tmp_path: Path, flat: Path) -> None:
    fails(tmp_path / "absent" / "deeper", "does not exist", "has no absent")
    fails(flat.parent / "petz", "did you mean", "pets'?")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no images", "class folders", "train800.txt", "train.json", "CSV")
    images.plain(tmp_path / "loose" / "a.png", images.RED)
    fails(tmp_path / "loose", "1 images but no class folders")
    images.class_folders(tmp_path / "single", {"only": 3})
    fails(tmp_path / "single", "one class", '"only"')
    images.class_folders(tmp_path / "outer" / "inner", {"a": 3, "b": 3})
    fails(tmp_path / "outer", "did you mean", "inner, which holds a, b")
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path / "notes.txt", "is a file, and not a .csv")
    images.class_folders(tmp_path / "tiny", {"a": 1, "b": 1})
    fails(tmp_path / "tiny", "too few")
    fails(flat, "val_fraction", "1.5", val_fraction=1.5)


def test_check_reads_every_file_to_its_end(tmp_path: Path) -> None:
    root = images.class_folders(tmp_path, {"a": 5, "b": 5})
    data = load_data(root)
    data.check()
    images.truncated(root / "b" / "003.png")
    with pytest.raises(DataError, match=r"b/003\.png.*cut short"):
        data.check()
    data.check(decode=False)
    (root / "a" / "001.png").unlink()
    with pytest.raises(DataError, match=r"a/001\.png.*does not exist"):
        data.check(decode=False)


def test_check_names_the_label_that_is_out_of_range() -> None:
    split = Split([None] * 3, [0, 1, 7], ["x", "y", "z"])
    with pytest.raises(DataError, match=r"z of the train split has the label 7.*0\.\.1"):
        ImageData("d", ("a", "b"), split).check(decode=False)
    with pytest.raises(DataError, match='one class, "a"'):
        ImageData("d", ("a", "b"), split.subset([0])).check(decode=False)
    with pytest.raises(DataError, match="val split has no images"):
        ImageData("d", ("a", "b"), split.subset([0, 1]), val=split.subset([])).check(decode=False)


# CSV


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    return images.class_folders(tmp_path, {"a": 6, "b": 6}, size=4)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_with_its_own_split(listed: Path, suffix: str) -> None:
    rows = [[f"{c}/{i:03d}.png", f"kind, {c}", ["train", "Valid", "test"][i % 3]] for c in "ab" for i in range(6)]
    data = load_data(write_csv(listed / f"list{suffix}", ["Path", "label", "split"], rows))
    assert data.class_names == ("kind, a", "kind, b")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 4, "val": 4, "test": 4}
    data.check()


def test_csv_puts_whole_numbers_in_their_order(listed: Path) -> None:
    rows = [[f"a/{i:03d}.png", str(label)] for i, label in enumerate([10, 9, 2, 10, 9, 2])]
    data = load_data(write_csv(listed / "list.csv", ["path", "label"], rows), val_fraction=0)
    assert data.class_names == ("2", "9", "10")
    assert data.train.labels == [2, 1, 0, 2, 1, 0]


def test_csv_mistakes(listed: Path) -> None:
    path, header = listed / "list.csv", ["path", "label"]
    fails(write_csv(path, ["file", "label"], [["a/000.png", "a"]]), "columns path and label", "it has: file, label")
    fails(write_csv(path, header, []), "lists no images")
    fails(write_csv(path, header, [["a/000.png", "a"], ["a/001.png", ""]]), "line 3", "label is empty")
    fails(write_csv(path, header, [["a/000.png", "a"], ["b/999.png", "b"]]), "b/999.png is listed and does not exist")
    fails(write_csv(path, header, [["z/000.png", "a"], ["z/001.png", "b"]]), "z/000.png is listed and does not exist")
    fails(write_csv(path, header, [["a/000.png", "a"], ["a/001.png", "a"]]), "one class")
    rows = [["a/000.png", "a", "train"], ["b/000.png", "b", "train"]]
    fails(write_csv(path, [*header, "split"], [*rows, ["b/001.png", "b", "dev"]]), 'line 4: the split is "dev"')
    fails(write_csv(path, [*header, "split"], [*rows, ["b/001.png", "c", "test"]]), '"c", which no training image has')
    fails(write_csv(path, [*header, "split"], [["a/000.png", "a", "test"]]), "no training images")
    path.write_bytes(b"path,label\n\xff\xfe,a\n")
    fails(path, "UTF-8")


# The formats of the field


def vtab(root: Path, name: str, labels: dict[str, list[int]]) -> Path:
    folder = root / name
    for file, numbers in labels.items():
        lines = []
        for i, label in enumerate(numbers):
            relative = f"images/{file.removesuffix('.txt')}/{i:05d}.jpg"
            images.plain(folder / relative, images.RED, size=4)
            lines.append(f"{relative} {label}")
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def test_vtab_lists(tmp_path: Path) -> None:
    folder = vtab(tmp_path, "svhn", {"train800.txt": [0, 1, 2, 9], "val200.txt": [3, 0], "test.txt": [5, 5, 5]})
    data = load_data(folder)
    assert data.num_classes == VTAB_CLASSES["svhn"] == 10
    assert (data.train.labels, data.val.labels, data.test.labels) == ([0, 1, 2, 9], [3, 0], [5, 5, 5])  # type: ignore[union-attr]
    data.check()


def test_vtab_with_the_joint_list_only(tmp_path: Path) -> None:
    folder = vtab(tmp_path, "mine", {"train800val200.txt": [0, 1, 2] * 5, "test.txt": [0, 1, 2]})
    data = load_data(folder, val_fraction=0.2)
    assert data.class_names == ("0", "1", "2")
    assert data.train.counts(3) == [4, 4, 4]
    assert data.val.counts(3) == [1, 1, 1]  # type: ignore[union-attr]


def test_vtab_mistakes(tmp_path: Path) -> None:
    fails(vtab(tmp_path, "svhn", {"train800.txt": [0, 1], "val200.txt": [10], "test.txt": [0]}), "label 10", "0..9")
    fails(vtab(tmp_path, "gap", {"train800.txt": [0, 1], "val200.txt": [900], "test.txt": [0]}), "label 900", "0..2")
    fails(vtab(tmp_path, "neg", {"train800.txt": [0, 1, -1], "val200.txt": [1], "test.txt": [0]}), "label -1")
    fails(vtab(tmp_path, "noval", {"train800.txt": [0, 1], "test.txt": [0]}), "without its list val200.txt")
    folder = vtab(tmp_path, "bad", {"train800.txt": [0, 1], "val200.txt": [0], "test.txt": [0]})
    (folder / "val200.txt").write_text("images/val200/00000.jpg\n")
    fails(folder, "val200.txt, line 1")
    (folder / "val200.txt").write_text("")
    fails(folder, "val200.txt lists no images")


def fgvc(folder: Path, below: str, lists: dict[str, dict[str, object]]) -> Path:
    for split, entries in lists.items():
        for name in entries:
            images.plain(folder / below / name, images.RED, size=4)
        (folder / f"{split}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("below", ["images", "Images", ""])
def test_fgvc_lists_with_gaps_in_the_class_ids(below: str, tmp_path: Path) -> None:
    lists = {
        "train": {"x/b.jpg": 7, "x/a.jpg": 100, "y/c.jpg": 20},
        "val": {"x/d.jpg": 100},
        "test": {"x/e.jpg": 7, "y/f.jpg": 20},
    }
    data = load_data(fgvc(tmp_path / "stanforddogs", below, lists))
    assert data.class_names == ("7", "20", "100")
    assert data.train.names == ["x/a.jpg", "x/b.jpg", "y/c.jpg"]
    assert (data.train.labels, data.val.labels, data.test.labels) == ([2, 0, 1], [2], [0, 1])  # type: ignore[union-attr]
    data.check()


def test_fgvc_mistakes(tmp_path: Path) -> None:
    two = {"a.jpg": 1, "b.jpg": 2}
    fails(fgvc(tmp_path / "a", "", {"train": two}), "without its list test.json")
    fails(fgvc(tmp_path / "b", "", {"train": two, "test": {"c.jpg": 3}}), 'label "3", which no training image has')
    folder = fgvc(tmp_path / "c", "images", {"train": two, "test": {"c.jpg": 2}})
    (folder / "images" / "a.jpg").unlink()
    fails(folder, "a.jpg is listed and does not exist", "images")
    (folder / "train.json").write_text("[]")
    fails(folder, "train.json must hold an object")
    (folder / "train.json").write_text("{")
    fails(folder, "train.json is not valid JSON")
