"""`fewtune predict` on a folder with damaged files among the good ones."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from fewtune.cli import main
from fewtune.tasks import fit
from images import plain, truncated
from runs import coloured_folder, tiny_recipe


def test_damaged_files_are_named_and_the_others_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coloured_folder(tmp_path / "data", classes=2, each=6)
    task = fit(tiny_recipe(data, epochs=1, importance="magnitude"), tmp_path / "run").folder.delta
    folder = tmp_path / "many"
    for i in range(195):
        plain(folder / f"{i:03d}.png", (i, 100, 200), seed=i)
    truncated(folder / "cut.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "head.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bad = {"cut.png", "empty.jpg", "text.png", "head.jpg", "gone.png"}
    capsys.readouterr()

    def predict(*more: str) -> tuple[int, str, str]:
        command = ["fewtune", "predict", "--delta", str(task), str(folder), "--accelerator", "cpu", *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr()
        return int(exit_.value.code or 0), told.out, told.err

    status, out, _ = predict()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1
    assert [Path(row["file"]).name for row in rows] == sorted(path.name for path in folder.iterdir())
    assert {Path(row["file"]).name for row in rows if row["error"]} == bad
    assert all(Path(row["file"]).name in row["error"] and not row["prediction"] for row in rows if row["error"])
    assert sum(row["prediction"] in ("class0", "class1") for row in rows) == 195
    status, out, err = predict("--strict")
    assert (status, out) == (2, "")
    assert "cannot read the image" in err
