"""The published data sets: declarations, and `fewtune data check` on a miniature of each in its true format."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner

import miniatures
from fewtune.cli.app import app
from fewtune.data import load_data
from fewtune.data.catalog import DECLARATIONS, FGVC, OOD, VTAB, declaration, find_folder
from fewtune.data.check import check
from fewtune.data.formats.cifar import read_part
from fewtune.data.listing import Counts
from fewtune.data.prepare import prepare
from fewtune.errors import DataError

KEYS = list(DECLARATIONS)


def run(*arguments: object) -> tuple[int, str]:
    """The command line: exit status, and what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    status = result.return_value if isinstance(result.return_value, int) else result.exit_code
    return status, result.stdout


def test_declarations_are_those_of_the_paper() -> None:
    assert (len(FGVC), len(VTAB), len(OOD), len(KEYS)) == (5, 19, 3, 30)
    assert declaration("nabirds").counts == (21536, 2393, 24633)
    assert declaration("imagenet-1k").counts == (1281167, None, 50000)
    assert declaration("imagenet-c").counts.test == 75 * 50000
    assert sum(d.counts.test or 0 for d in VTAB) == 10000 + 6084 + 1880 + 6149 + 3669 + 26032 + 21750 + 32768 + 5400 + (
        6300 + 42670 + 15000 + 15000 + 22735 + 711 + 73728 + 73728 + 12150 + 12150
    )
    assert all(d.counts[:2] == (800, 200) for d in VTAB)
    assert all(d.licence and d.source.startswith("http") and d.fetch for d in DECLARATIONS.values())
    with pytest.raises(DataError, match="did you mean 'cub-200-2011'"):
        declaration("cub-200")


@pytest.mark.parametrize("key", KEYS)
def test_check_passes_and_finds_every_planted_fault(key: str, tmp_path: Path) -> None:
    data_set = miniatures.build(key, tmp_path, train=60 if key == "kvasir-seg" else 6)
    got = check(data_set, tmp_path)
    assert got.faults == ()
    assert got.counts == {name: n for name, n in data_set.counts._asdict().items() if n is not None}
    assert check(declaration(key), tmp_path).faults  # the miniature is not the whole
    expected = miniatures.plant(data_set, tmp_path)
    faults = check(data_set, tmp_path).faults
    for words in expected:
        assert any(all(word in fault for word in words) for fault in faults), (words, faults)
    assert len(faults) == len(expected), faults
    assert all("\n" not in fault for fault in faults)


def test_command_line_lists_all_faults_and_exits_with_2(tmp_path: Path) -> None:
    miniatures.build("vtab-dtd", tmp_path)
    expected = ("data", "check", "vtab-dtd", "--data", tmp_path, "--counts", "train=6,val=3,test=6")
    status, text = run(*expected)
    assert status == 0
    assert "DTD is whole: 6 train, 3 val, 6 test; 47 classes; 15 images opened" in text
    faults = miniatures.plant(declaration("vtab-dtd"), tmp_path)
    status, text = run(*expected)
    assert status == 2
    assert len(text.splitlines()) == len(faults) + 1
    status, text = run(*expected, "--json", "--no-duplicates", "--sample", 1)
    assert status == 2
    got = json.loads(text)
    assert got["opened"] == 3
    assert not any("same image" in fault for fault in got["faults"])


def test_list_info_and_prepare(tmp_path: Path) -> None:
    assert "CUB-200-2011" in run("data", "list")[1]
    assert [entry["key"] for entry in json.loads(run("data", "list", "--json")[1])] == KEYS
    status, text = run("data", "info", "imagenet-r")
    assert (status, "MIT" in text, "30,000 test" in text) == (0, True, True)
    status, text = run("data", "prepare", "vtab-kitti", "--data", tmp_path)
    assert status == 2
    assert "get_vtab1k.py" in text
    assert "train800val200.txt" in text
    miniatures.build("vtab-kitti", tmp_path)
    assert run("data", "prepare", "vtab-kitti", "--data", tmp_path)[0] == 0
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar"):
        prepare(declaration("imagenet-1k"), tmp_path, print)


def test_prepare_downloads_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def cifar(root: Path, download: bool, train: bool) -> None:
        assert download
        miniatures.build("cifar-100", Path(root))

    class Flowers:
        def __init__(self, root: Path, download: bool, split: str) -> None:
            start = {"train": 0, "val": 10, "test": 20}[split]
            base = Path(root) / "flowers-102/jpg"
            self._image_files = [miniatures.picture(base / f"image_{start + i:05d}.jpg", start + i) for i in range(4)]
            self._labels = [0, 0, 1, 1]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", cifar)
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Flowers)
    assert prepare(declaration("cifar-100"), tmp_path, print) == tmp_path / "cifar-100-python"
    assert prepare(declaration("oxford-flowers"), tmp_path, print) == tmp_path / "oxfordflower"
    assert check(declaration("oxford-flowers").part(2, Counts(4, 4, 4)), tmp_path).faults == ()
    assert load_data(f"task:oxford-flowers?root={tmp_path}").test.labels == [0, 0, 1, 1]  # type: ignore[union-attr]


def test_folder_may_be_the_root_itself_or_lie_in_its_group(tmp_path: Path) -> None:
    dtd = declaration("vtab-dtd")
    miniatures.build("vtab-dtd", tmp_path / "vtab-1k")
    assert find_folder(dtd, tmp_path) == tmp_path / "vtab-1k/dtd"
    assert find_folder(dtd, tmp_path / "vtab-1k/dtd") == tmp_path / "vtab-1k/dtd"
    with pytest.raises(DataError, match="Pets is not in"):
        find_folder(declaration("vtab-oxford-iiit-pet"), tmp_path / "vtab-1k/dtd")
    (tmp_path / "vtab-1k/dtd").rename(tmp_path / "mine")
    assert load_data(f"task:vtab-dtd?root={tmp_path / 'mine'}").num_classes == 47


def test_loading_declared_sets(tmp_path: Path) -> None:
    for key in ("imagenet-1k", "cifar-100", "imagenet-a", "kvasir-seg"):
        miniatures.build(key, tmp_path, train=8)
    data = load_data(f"task:imagenet-1k?root={tmp_path}", val_fraction=0.1)
    assert data.class_names == miniatures.WNIDS
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "val": 4, "test": 30}
    assert all(name.startswith("val/") for name in data.test.names)  # type: ignore[union-attr]
    cifar = load_data(f"task:cifar-100?root={tmp_path}", val_fraction=0.25)
    assert cifar.num_classes == 100
    stored = pickle.loads((tmp_path / "cifar-100-python/test").read_bytes())["data"][2]
    image = cifar.test.image(2)  # type: ignore[union-attr]
    assert image.getpixel((5, 7)) == tuple(stored.reshape(3, 32, 32)[:, 7, 5])
    for key, words in (("imagenet-a", "fewtune ood"), ("kvasir-seg", "segmentation")):
        with pytest.raises(DataError, match=words):
            load_data(f"task:{key}?root={tmp_path}")
    with pytest.raises(DataError, match="--data ROOT"):
        load_data("task:imagenet-1k")


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_few_shot_subsets(shots: int, tmp_path: Path) -> None:
    miniatures.build("imagenet-1k", tmp_path, train=9)
    spec = f"task:imagenet-1k?root={tmp_path}"
    data = load_data(spec, shots=shots, seed=1)
    assert data.train.counts(5) == [shots] * 5
    assert data.val.counts(5) == [min(shots, 4)] * 5  # type: ignore[union-attr]
    assert not set(data.train.names) & set(data.val.names)  # type: ignore[union-attr]
    assert data.train.names == load_data(spec, shots=shots, seed=1).train.names
    assert data.train.names != load_data(spec, shots=shots, seed=2).train.names
    with pytest.raises(DataError, match="shots=9 needs"):
        load_data(spec, shots=9)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "train").write_bytes(pickle.dumps({"data": Harm()}))
    with pytest.raises(DataError, match="asks for"):
        read_part(tmp_path / "train")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "train").write_bytes(pickle.dumps({"data": [1] * 1000})[:200])
    with pytest.raises(DataError, match="damaged"):
        read_part(tmp_path / "train")
