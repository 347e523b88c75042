"""The order of reading in docs/extending.md, and modules named in strings, against what the code imports."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import fewtune

ROOT = Path(fewtune.__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
LINE = re.compile(r"^\d+\. `([\w/]+\.py)`(?: \(from `([\w/]+\.py)`\))?:", re.MULTILINE)
REFERENCE = re.compile(r"(fewtune(?:\.\w+)+):\w+")


def file_of(module: str) -> Path | None:
    """The file of a module or package of fewtune; None for other names."""
    stem = ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


@cache
def imported(file: Path) -> set[Path]:
    """The files of fewtune that a file imports, anywhere in it; of a package's front also what that passes on."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fewtune":
            modules |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names if name.name.split(".")[0] == "fewtune"}
    files = {path for module in modules if (path := file_of(module)) is not None} - {file, ROOT / "__init__.py"}
    return files.union(*(imported(path) for path in files if path.name == "__init__.py"))


def reached(file: Path) -> set[Path]:
    """What a file imports, itself or through one other file: a table, or what a method is."""
    near = imported(file)
    return near.union(*(imported(between) for between in near))


def test_each_file_of_the_order_is_reached_from_the_one_that_is_named() -> None:
    order = LINE.findall(PAGE)
    assert 10 <= len(order) <= 12
    assert len({file for file, _ in order}) == len(order)
    gone_back: list[str] = []
    for i, (file, origin) in enumerate(order[1:], start=1):
        before = [name for name, _ in order[:i]]
        assert not origin or origin in before[:-1], f"{file} comes from {origin}, which was not read before"
        assert ROOT / file in reached(ROOT / (origin or before[-1])), f"{origin or before[-1]} does not lead to {file}"
        gone_back += [origin] if origin else []
    assert len(set(gone_back)) == len(gone_back), "a file is gone back to twice"


def test_a_module_named_in_a_string_is_imported_by_that_file() -> None:
    """So that the import contracts see what tables and late functions name."""
    named = 0
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        strings = (
            n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )
        for module in (match[1] for string in strings if (match := REFERENCE.fullmatch(string))):
            named += 1
            assert file_of(module) in imported(file), f"{file.relative_to(ROOT)} names {module} and does not import it"
    assert named > 20
