"""Public signatures of the rooms that others build on say what they take and give: none of them names `Any`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewtune

ROOT = Path(fewtune.__file__).parent
ROOMS = ("delta", "methods", "training", "kinds.py", "tasks.py")


def functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods by qualified name; of the dunder methods those that a user calls."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (node.name in ("__init__", "__call__") or node.name[0] != "_"):
            yield prefix + node.name, node


def annotations(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Of all arguments and of what is returned."""
    named = function.args
    rest = [one for one in (named.vararg, named.kwarg) if one is not None]
    for argument in (*named.posonlyargs, *named.args, *named.kwonlyargs, *rest):
        if argument.annotation is not None:
            yield argument.annotation
    if function.returns is not None:
        yield function.returns


@pytest.mark.parametrize("room", ROOMS)
def test_no_public_signature_names_any(room: str) -> None:
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name, function in functions(ast.parse(file.read_text(encoding="utf-8")).body):
            for annotation in annotations(function):
                names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
                where = f"{file.relative_to(ROOT)}:{function.lineno} {name}"
                assert "Any" not in names, f"{where} is annotated with {ast.unparse(annotation)}"
