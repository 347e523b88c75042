"""A user's mistakes: one clear line on stderr, exit status 2, and nothing half-written."""

from __future__ import annotations

import builtins
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewtune.cli import main
from fewtune.tasks import fit
from runs import arguments, coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images", each=8)


@pytest.fixture(scope="module")
def task(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = fit(tiny_recipe(images, epochs=1, importance="magnitude"), tmp_path_factory.mktemp("runs") / "run")
    return result.folder.delta


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail, and give its one line."""

    def run(*command: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["fewtune", *map(str, command)])
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr()
        assert exit_.value.code == 2
        errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, told.err
        assert told.err.rstrip().endswith(errors[0])
        assert told.out == ""
        assert "Traceback" not in told.err
        return errors[0]

    return run


def _one_class(folder: Path) -> None:
    coloured_folder(folder, classes=1)


def _empty(folder: Path) -> None:
    (folder / "class0").mkdir(parents=True)
    (folder / "class1").mkdir()


def _truncated(folder: Path) -> None:
    coloured_folder(folder, classes=2)
    broken = folder / "class1" / "03.png"
    broken.write_bytes(broken.read_bytes()[:200])


def _no_image(folder: Path) -> None:
    coloured_folder(folder, classes=2)
    (folder / "class1" / "03.png").write_text("not an image")


def _label_out_of_range(folder: Path) -> None:
    """A VTAB-1k folder with a negative label."""
    coloured_folder(folder / "images", classes=2)
    lines = [f"images/class{label}/{i:02d}.png {label}" for label in (0, 1) for i in range(12)]
    for name in ("train800.txt", "val200.txt", "train800val200.txt", "test.txt"):
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "train800.txt").write_text("\n".join([*lines, "images/class0/00.png -1"]) + "\n")


def _missing_list(folder: Path) -> None:
    _label_out_of_range(folder)
    (folder / "train800.txt").write_text("images/class0/00.png 0\nimages/class1/00.png 1\n")
    (folder / "test.txt").unlink()


def _listed_but_absent(folder: Path) -> None:
    coloured_folder(folder, classes=2)
    rows = [f"class{label}/{i:02d}.png,class{label}" for label in (0, 1) for i in range(12)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows, "class0/99.png,class0"]) + "\n")


@pytest.mark.parametrize(
    ("make", "spec", "part"),
    [
        (_empty, ".", "image"),
        (_one_class, ".", "class"),
        (_truncated, ".", "03.png"),
        (_no_image, ".", "03.png"),
        (_label_out_of_range, ".", "-1"),
        (_missing_list, ".", "test.txt"),
        (_listed_but_absent, "list.csv", "99.png"),
        (_one_class, "nowhere", "nowhere"),
    ],
)
def test_data(make: Callable[[Path], None], spec: str, part: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    make(tmp_path / "data")
    out = tmp_path / "run"
    assert part in refused("fit", *arguments(tmp_path / "data" / spec), "--out", out)
    assert not out.exists()


def test_models_and_settings(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "run"
    assert "test_vit" in refused("fit", *arguments(images, model="timm:test_vti"), "--out", out)
    line = refused("fit", *arguments(images), "--out", out, "epocs=3", "lr=fast")
    assert "did you mean 'epochs'" in line
    assert "lr: " in line
    assert "'model' is missing" in refused("fit", "--data", images, "--out", out)
    assert "no configuration file" in refused("fit", "recipe.yaml", "--out", out)
    assert "less than one connection a neuron" in refused("fit", *arguments(images, k=0.5), "--out", out)
    assert not out.exists()


def test_arguments(images: Path, refused: Callable[..., str]) -> None:
    assert "--no-such-option" in refused("fit", "--no-such-option")
    assert "command" in refused("fitt")
    assert "--out" in refused("fit", "--resume")
    assert "--delta" in refused("evaluate", "--data", images)
    assert ".csv or .json" in refused("predict", "--delta", "x", images, "--out", "x.txt")
    assert ".safetensors" in refused("delta", "export", "x", "--out", "x.pth")


def test_task_files(task: Path, images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "none.safetensors" in refused("predict", "--delta", tmp_path / "none.safetensors", images)
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(task.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert "damaged" in refused("predict", "--delta", damaged, images)
    assert "no image" in refused("predict", "--delta", task, tmp_path / "nowhere")
    assert "no images" in refused("predict", "--delta", task, tmp_path)
    wide = coloured_folder(tmp_path / "wide", classes=4, each=4)
    line = refused("evaluate", "--delta", task, "--data", wide)
    assert "4 classes" in line
    assert "knows 3" in line
    assert "class3" in line
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert "split" in refused("evaluate", "--delta", task, "--data", images, "--split", "exam")


def test_predictions_to_compare(task: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    own = task.parent / "test_predictions.csv"
    assert "no file of predictions" in refused("evaluate", "--compare", own, tmp_path / "none.csv")
    short = tmp_path / "short.csv"
    short.write_text("\n".join(own.read_text().splitlines()[:-1]) + "\n")
    assert "different images" in refused("evaluate", "--compare", own, short)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert "columns file, label and prediction" in refused("evaluate", "--compare", own, other)


def test_a_full_disk_leaves_nothing_half_written(task: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """No file may grow beyond 100 kB, as on a disk with no more room: the merged checkpoint has 1.2 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "too large" in refused("delta", "export", task, "--out", tmp_path / "merged.safetensors").lower()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(task: Path, images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "Not a directory" in refused("fit", *arguments(images), "--out", file / "run")
    assert "Not a directory" in refused("delta", "export", task, "--out", file / "merged.safetensors")
    assert "No such file or directory" in refused(
        "predict", "--delta", task, images, "--out", tmp_path / "no" / "p.csv"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused("fit", *arguments(images), "--out", tmp_path / "run")


def test_help_and_version_are_quick_and_need_little(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import sys, fewtune.cli.app; print([m for m in ('lightning', 'timm', 'torchmetrics') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True).stdout == "[]\n"


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    imported = builtins.__import__

    def without_typer(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return imported(name, *rest)

    for name in [name for name in sys.modules if name.startswith("fewtune.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_typer)
    assert refused("demo") == "error: typer is not installed, and this needs it: pip install 'fewtune[train]'"
    monkeypatch.setattr(sys, "argv", ["fewtune", "--version"])
    main()
