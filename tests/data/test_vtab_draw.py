"""VTAB-1k's lists drawn from public archives: the rule, the published lists, and the folder of a task."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import miniatures
from fewtune.cli.app import app
from fewtune.data import load_data
from fewtune.data.catalog import VTAB, declaration
from fewtune.data.check import check
from fewtune.data.listing import Counts
from fewtune.data.prepare import prepare
from fewtune.data.vtab_archives import READERS
from fewtune.data.vtab_draw import DRAWS, Draw, Part, Record, digest, drawn, in_turns, ordered
from fewtune.errors import DataError

HERE = Path(__file__).parent
DATA = Path(os.environ.get("FEWTUNE_TEST_DATA", HERE.parents[2] / "shared/data"))
PUBLISHED = [list(map(int, line.split())) for line in (HERE.parent / "data_files/vtab-cifar-labels.txt").open()]
"""The labels of VTAB-1k's published CIFAR-100 lists, train800 and val200."""
EUROSAT = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
    "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip
"""Images of each class; they are called CLASS_1.jpg, CLASS_2.jpg, …"""

CLASSES = [f"class {i}" for i in range(102)]


def rule(key: str) -> Draw:
    got = DRAWS[key]
    assert isinstance(got, Draw)
    return got


def published_list(archive: str, name: str) -> list[tuple[str, int]]:
    """(file name, label) of a list within a zip of the real images."""
    path = DATA / archive
    if not path.is_file():
        pytest.skip(f"{archive} is not in {DATA}; FEWTUNE_TEST_DATA says where it is")
    with zipfile.ZipFile(path) as zipped:
        (member,) = (entry for entry in zipped.namelist() if entry.endswith(f"/{name}") or entry == name)
        lines = zipped.read(member).decode().splitlines()
    return [(line.rpartition(" ")[0].rpartition("/")[2], int(line.rpartition(" ")[2])) for line in lines]


def entries(records: list[Record]) -> list[tuple[str, int]]:
    return [(record.name.rpartition("/")[2], record.label) for record in records]


def cifar_labels() -> list[int]:
    """The 50,000 labels of a training file that has the published ones where VTAB looks, and 0 elsewhere."""
    order = sorted(range(50_000), key=lambda i: int(hashlib.md5(f"train{i}".encode()).hexdigest(), 16))
    assert order[:5] == [16399, 1680, 47917, 17307, 27051]
    labels = [0] * 50_000
    for start, part in zip((0, 45_000), PUBLISHED, strict=True):
        for position, label in zip(order[start:], part, strict=False):
            labels[position] = label
    return labels


def cifar_splits(labels: list[int]) -> dict[str, list[Record]]:
    pixels = np.broadcast_to(np.uint8(7), (50_000, 32, 32, 3))
    parts = {True: SimpleNamespace(data=pixels, targets=labels, classes=CLASSES),
             False: SimpleNamespace(data=pixels[:10_000], targets=[1] * 10_000)}  # fmt: skip
    return READERS["CIFAR100"](lambda name, train: parts[train]).splits


def eurosat_splits() -> dict[str, list[Record]]:
    samples = [
        (f"/eurosat/2750/{name}/{name}_{i}.jpg", label)
        for label, (name, count) in enumerate(EUROSAT.items())
        for i in range(1, count + 1)
    ]
    return READERS["EuroSAT"](lambda name: SimpleNamespace(samples=samples, classes=list(EUROSAT))).splits


def test_cifar_has_the_labels_of_the_published_lists() -> None:
    assert [len(part) for part in PUBLISHED] == [800, 200]
    lists = drawn(rule("cifar"), cifar_splits(cifar_labels()))
    assert [record.label for record in lists["train800.txt"]] == PUBLISHED[0]
    assert [record.label for record in lists["val200.txt"]] == PUBLISHED[1]
    assert digest(lists["train800.txt"] + lists["val200.txt"]) == rule("cifar").labels
    assert lists["train800.txt"][0].name == "train/016399.png"
    assert len(lists["test.txt"]) == 10_000


def test_a_file_with_other_labels_is_refused() -> None:
    labels = cifar_labels()
    labels[16399] += 1
    with pytest.raises(DataError, match="not those of VTAB-1k's published lists"):
        drawn(rule("cifar"), cifar_splits(labels))
    splits = cifar_splits(labels)
    splits["train"].pop()
    with pytest.raises(DataError, match=r"CIFAR100 has 49,999 images in train, expected 50,000"):
        drawn(rule("cifar"), splits)


def test_eurosat_by_the_names_of_its_files() -> None:
    lists = drawn(rule("eurosat"), eurosat_splits())
    assert {name: len(records) for name, records in lists.items()} == {
        "train800.txt": 800, "val200.txt": 200, "test.txt": 5400, "train800val200.txt": 1000
    }  # fmt: skip
    names = "\n".join(record.name for record in lists["train800val200.txt"])
    assert hashlib.sha256(names.encode()).hexdigest() == (
        "67e8ad6996c33b3d2fac9f5d32a73fa908e8e9e4be97f2b2a70fa5b074b29a2d"
    )
    sets = [{record.name for record in lists[name]} for name in ("train800.txt", "val200.txt", "test.txt")]
    assert len(set.union(*sets)) == sum(map(len, sets))


@pytest.mark.data
def test_eurosat_is_the_draw_of_the_real_images() -> None:
    lists = drawn(rule("eurosat"), eurosat_splits())
    for name in ("train800.txt", "val200.txt", "train800val200.txt"):
        assert entries(lists[name]) == published_list("eurosat_vtab1k.zip", name)
    tested = set(entries(lists["test.txt"]))
    assert set(published_list("eurosat_vtab1k.zip", "test.txt")) <= tested


@pytest.mark.data
def test_flowers_are_in_the_order_of_the_rule() -> None:
    """Of the official division only the drawn images are at hand: their order, and that they are the first."""
    for split, name, of in (("train", "train800.txt", 1020), ("validation", "val200.txt", 1020)):
        listed = published_list("flowers102_vtab1k.zip", name)
        records = [Record(file, label, file) for file, label in listed]
        assert entries(ordered(split, reversed(records))) == listed
        last = int(hashlib.md5(f"{split}{listed[-1][0]}".encode()).hexdigest(), 16) / 2**128
        assert last == pytest.approx(len(listed) / of, abs=0.03)  # digests lie evenly between 0 and 1


@pytest.mark.data
@pytest.mark.parametrize("archive", ["eurosat_vtab1k.zip", "flowers102_vtab1k.zip", "cifar100_vtablabels.zip"])
def test_joint_list_takes_the_two_in_turn(archive: str) -> None:
    train, val, joint = (
        [Record(name, label, name) for name, label in published_list(archive, f"{file}.txt")]
        for file in ("train800", "val200", "train800val200")
    )
    assert in_turns(train, val) == joint
    if archive.startswith("cifar"):
        assert [record.label for record in train + val] == PUBLISHED[0] + PUBLISHED[1]


def test_prepare_draws_a_task_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    class Flowers:
        def __init__(self, root: Path, download: bool, split: str) -> None:
            assert download
            start, count = {"train": (0, 30), "val": (30, 20), "test": (50, 10)}[split]
            base = Path(root) / "flowers-102/jpg"
            self._image_files = [
                miniatures.picture(base / f"image_{start + i:05d}.jpg", start + i) for i in range(count)
            ]
            self._labels = [i % 3 for i in range(count)]
            self.classes = CLASSES

    monkeypatch.setattr(torchvision.datasets, "Flowers102", Flowers)
    flowers = declaration("vtab/oxford_flowers102")
    assert flowers.draw == rule("oxford_flowers102")
    small = replace(flowers, draw=replace(flowers.draw, records={"train": 30, "validation": 20, "test": 10}))
    folder = prepare(small, tmp_path, print)
    assert folder == tmp_path / "vtab-1k/oxford_flowers102"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["oxford_flowers102"]
    assert check(flowers.part(counts=Counts(30, 20, 10)), tmp_path).faults == ()
    assert load_data(f"task:vtab-oxford-flowers102?root={tmp_path}").class_names == tuple(CLASSES)
    first = (folder / "train800.txt").read_text().split()[0]
    assert (folder / first).read_bytes() == (tmp_path / "flowers-102/jpg" / Path(first).name).read_bytes()
    before = (folder / "train800.txt").stat().st_mtime_ns
    assert prepare(small, tmp_path, print) == folder
    assert (folder / "train800.txt").stat().st_mtime_ns == before
    (folder / "train800.txt").unlink()
    (folder / "train800val200.txt").unlink()
    with pytest.raises(DataError, match="holds other files"):
        prepare(small, tmp_path, print)
    with pytest.raises(DataError, match="expected 1,020"):
        prepare(flowers, tmp_path / "again", print)
    assert not (tmp_path / "again/vtab-1k").exists()


def test_prepare_draws_a_task_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's folder of the archive has the task's name, and is not taken for the task."""
    import torchvision

    rng = np.random.default_rng(0)

    def svhn(root: Path, download: bool, split: str) -> SimpleNamespace:
        (Path(root) / "svhn").mkdir(parents=True, exist_ok=True)
        count = {"train": 40, "test": 5}[split]
        return SimpleNamespace(
            data=rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), labels=np.arange(count) % 10
        )

    monkeypatch.setattr(torchvision.datasets, "SVHN", svhn)
    (tmp_path / "svhn").mkdir()
    numbers = declaration("vtab/svhn")
    small = replace(numbers, draw=replace(numbers.draw, records={"train": 40, "test": 5}))  # type: ignore[type-var]
    prepare(small, tmp_path, print)
    data = load_data(f"task:vtab/svhn?root={tmp_path}")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "val": 4, "test": 5}
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        assert int(Path(name).stem) % 10 == label
    assert data.train.image(0).size == (32, 32)


def test_names_of_classes_must_fit_the_task(tmp_path: Path) -> None:
    miniatures.build("vtab-dtd", tmp_path)
    names = tmp_path / "dtd/classes.txt"
    assert load_data(f"task:vtab/dtd?root={tmp_path}").class_names[:2] == ("0", "1")
    for lines, words in (
        (["banded"], "has 1 lines, expected one for each of 47"),
        (["banded"] * 47, "names a class twice"),
    ):
        names.write_text("\n".join(lines))
        with pytest.raises(DataError, match=words):
            load_data(f"task:vtab/dtd?root={tmp_path}")
    names.write_text("\n".join(f"kind {i}" for i in range(47)))
    assert load_data(f"task:vtab/dtd?root={tmp_path}").class_names[:2] == ("kind 0", "kind 1")
    (tmp_path / "dtd").rename(tmp_path / "mine")
    assert load_data(tmp_path / "mine").num_classes == 47  # more than the lists have
    with pytest.raises(DataError, match=r"say task:vtab/dtd\?root=ROOT"):
        load_data("vtab/dtd")


def test_readers_know_the_keys_of_dtd_and_pets() -> None:
    base = SimpleNamespace(_image_files=[Path("/dtd/images/banded/banded_0002.jpg")], _labels=[0], classes=["a"])
    (record,) = READERS["DTD"](lambda name, split: base).splits["validation"]
    assert (record.key, record.name) == ("banded/banded_0002.jpg", "banded/banded_0002.jpg")
    pets = SimpleNamespace(_images=[Path("/images/Abyssinian_100.jpg")], _labels=[0], classes=["a"])
    (record,) = READERS["OxfordIIITPet"](lambda name, split: pets).splits["train"]
    assert record.key == "Abyssinian_100.jpg"
    assert Part("train", 80) == rule("oxford_iiit_pet").val


def test_info_says_of_every_task_how_it_is_drawn(tmp_path: Path) -> None:
    assert {task.folders[0] for task in VTAB} == set(DRAWS)
    said = {}
    for task in VTAB:
        printed = CliRunner().invoke(app, ["data", "info", f"vtab/{task.folders[0]}"], catch_exceptions=False).stdout
        (said[task.folders[0]],) = (line for line in printed.splitlines() if line.startswith("drawn"))
    assert "all 1,000 labels are checked against the published lists" in said["cifar"]
    unchecked = {name for name, line in said.items() if "unchecked" in line}
    assert unchecked == {"dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "eurosat"}
    assert all("not by" in said[name] or "not built" in said[name] for name in set(said) - unchecked - {"cifar"})
