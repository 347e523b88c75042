"""The page of the Python interface shows every public name."""

from __future__ import annotations

import importlib
import re

import fewtune
from documents import ROOT

PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")


def shown() -> set[str]:
    """The last parts of the names that the page documents, those of whole modules among them."""
    names = {name.rpartition(".")[2] for name in re.findall(r"auto(?:function|class|exception|data):: ([\w.]+)", PAGE)}
    for module in re.findall(r"automodule:: ([\w.]+)\n +:members:\n", PAGE):
        within = vars(importlib.import_module(module))
        names |= {name for name, value in within.items() if getattr(value, "__module__", None) == module}
    return names


def test_every_public_name_is_on_the_page() -> None:
    public = {*fewtune.__all__, *fewtune.WITH_TRAINING} - {"__version__"}
    assert public <= shown(), f"docs/api.md lacks {sorted(public - shown())}"


def test_the_page_names_only_what_there_is() -> None:
    current = ""
    for directive, name in re.findall(r"\.\. (currentmodule|auto(?:function|class|exception)):: ([\w.]+)", PAGE):
        if directive == "currentmodule":
            current = name
            continue
        module, _, last = (name if name.startswith("fewtune.") else f"{current}.{name}").rpartition(".")
        assert hasattr(importlib.import_module(module), last), name
