"""The commands and the Python of docs/export.md, as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from runs import arguments, coloured_folder
from runs import fewtune as command

PAGE = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coloured_folder(Path("photos"))
    assert command("fit", *arguments(Path("photos"), epochs=1), "--out", "runs/photos").returncode == 0
    (script,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for line in script.strip().splitlines():
        done = command(*shlex.split(line, comments=True)[1:])
        assert done.returncode == 0, done.stderr
        assert "Load it with" in done.stdout
    assert "accuracy on 9 images" in done.stdout
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    space: dict = {}
    exec(code, space)
    assert space["names"] == ["class0", "class1", "class2"]
