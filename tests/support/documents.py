"""The blocks of code on README and the pages of docs/, and how commands are cut out of them.

A block that the tests do not run has `<!-- not run: why -->` on the line above. Its commands and its Python must still
be ones that fewtune would take.
"""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
import yaml

from fewtune.config import Recipe
from fewtune.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "docs/command-line.md"  # from the commands, when the site is built
PAGES = [
    ROOT / "README.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {MADE}),
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
]
LANGUAGES = ("sh", "python", "yaml", "toml", "text")
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.S | re.M
)
ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """What stands between two fences. reason: why the tests do not run it; None where they do."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """A page's blocks in their order; directives of the site (`{toctree}`, `{code-cell}`) are none."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: one.start()].count("\n") + 1, one["language"], one["text"], one["reason"])
        for one in FENCE.finditer(text)
        if not one["language"].startswith("{")
    ]


def outside_fences(page: Path) -> list[str]:
    """The lines of a page that are in no block."""
    return FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments, settings of the environment and pipes."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and ASSIGNMENT.match(words[0]):
            words = words[1:]
        words = words[: words.index("|")] if "|" in words else words
        if words:
            found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """That a command is one: its options are known, its extras, scripts and targets are there. Nothing is run."""
    match words:
        case ["fewtune", *arguments]:
            check_fewtune(arguments)
        case ["pip", "install", *requirements]:
            for requirement in requirements:
                check_requirement(requirement)
        case ["python", "-m", module, *_]:
            __import__(module)
        case ["python", script, *arguments]:
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in (word for word in arguments if word.startswith("--")):
                assert f'"{option}"' in source, f"{script} has no {option}"
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"


def check_fewtune(arguments: list[str]) -> None:
    """That fewtune would take the arguments: command, options and names of settings."""
    from fewtune.cli.app import app

    command: Any = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        if arguments[0].startswith("--"):  # of fewtune itself
            command.make_context("fewtune", list(arguments), resilient_parsing=True)
            return
        name, *arguments = arguments
        assert name in command.commands, f"fewtune has no command '{name}'"
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        command = command.commands[name]
    command.make_context(command.name, list(arguments), parent=context)
    if command.name == "fit":
        known = {*Recipe.model_fields, *(key for method in METHODS.values() for key in method.settings.model_fields)}
        for word in arguments:
            key, equals, _ = word.partition("=")
            assert not equals or not key.isidentifier() or key in known, f"no setting '{key}'"


def check_requirement(requirement: str) -> None:
    """That an extra of fewtune which is to be installed is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if (extras := re.fullmatch(r"fewtune\[(.*)\]", requirement)) is not None:
        assert set(extras[1].split(",")) <= set(project["optional-dependencies"]), requirement


def check_python(text: str) -> None:
    """That code is Python, and that what it imports of fewtune is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fewtune":
            exec(ast.unparse(node), {})


def check_data(block: Block) -> None:
    """That YAML and TOML can be read."""
    match block.language:
        case "yaml":
            assert yaml.safe_load(block.text)
        case "toml":
            assert tomllib.loads(block.text)
