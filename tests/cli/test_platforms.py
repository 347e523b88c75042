"""Windows and macOS: what only some systems have is needed by no import of fewtune, by no run and by no grid."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fewtune
from fewtune.training import memory

UNIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
SOURCE = Path(fewtune.__file__).parent

SCRIPT = """
import builtins, importlib, sys

usual = builtins.__import__

def without(name, globals=None, *rest, **more):  # other libraries ask for the system before they import such a module
    if name.partition(".")[0] in {blocked} and (globals or {{}}).get("__name__", "").startswith("fewtune"):
        raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
    return usual(name, globals, *rest, **more)

builtins.__import__ = without

from fewtune.bench.foreman import _alone
from fewtune.cli.app import app
from fewtune.errors import ConfigError
from fewtune.tasks import fit
from fewtune.training import memory

memory._status = lambda key: None  # as where there is no /proc
assert memory.peak_memory() == memory.held_memory() == 0
"""


def unguarded(path: Path) -> list[str]:
    """Imports of such modules outside a `try`, in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    got = []
    for node in ast.walk(tree):
        if node not in tried and isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            got += [f"{path}: {name}" for name in names if name.partition(".")[0] in UNIX_ONLY]
    return got


def test_no_file_imports_them_unguarded(tmp_path: Path) -> None:
    assert [line for path in SOURCE.rglob("*.py") for line in unguarded(path)] == []
    (tmp_path / "bad.py").write_text(
        "def lock():\n    import fcntl\n\n\ntry:\n    import resource\nexcept ImportError:\n    pass\n"
    )
    assert [line.rpartition(" ")[2] for line in unguarded(tmp_path / "bad.py")] == ["fcntl"]


def test_a_run_and_a_grid_import_without_them() -> None:
    command = [sys.executable, "-c", SCRIPT.format(blocked=UNIX_ONLY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_memory_is_unknown_where_nothing_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_status", lambda key: None)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_memory() == memory.held_memory() == 0
    windows = SimpleNamespace(CDLL=lambda name: 1 / name)  # of None it is a TypeError there too
    monkeypatch.setattr(memory, "ctypes", windows)
    memory.reset_peak_memory()
