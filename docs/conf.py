"""How the site is built: `make docs`. The tutorials run while it is built; an error in one fails the build."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import myst_nb.core.render
import typer.main
from nbformat import NotebookNode
from typer import Context
from typer.cli import get_docs_for_click

project = "fewtune"
author = "The fewtune authors"
project_copyright = author
version = release = installed("fewtune")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["Thumbs.db", ".DS_Store"]
html_theme = "furo"
html_title = "fewtune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

nb_execution_mode = "force"  # a tutorial runs whenever its page is read: from nothing, all of them
nb_execution_in_temp = True
nb_execution_timeout = 1200
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm, about widgets that no page has
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where `fewtune` lies

default_role = "code"  # docstrings name things in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """A cell's outputs with all of stdout as one, then all of stderr, before what else it shows.

    A command's output comes in pieces of 100 bytes, and myst-nb's own merging ends every piece with a line break.
    """
    texts: dict[str, NotebookNode] = {}
    for output in outputs:
        if output["output_type"] == "stream":
            first = texts.setdefault(output["name"], output)
            if first is not output:
                first["text"] += output["text"]
    others = [output for output in outputs if output["output_type"] != "stream"]
    return [texts[name] for name in ("stdout", "stderr") if name in texts] + others


myst_nb.core.render.coalesce_streams = joined_streams


def _with_whole_summaries(command: Any) -> None:
    """Lists of commands with the first sentence of each, which would be cut after 45 characters."""
    for one in getattr(command, "commands", {}).values():
        one.short_help = (one.help or "").partition("\n")[0]
        _with_whole_summaries(one)


def write_command_line(_app: object) -> None:
    """docs/command-line.md from the commands themselves, so that it says what they say."""
    from fewtune.cli.app import app

    command = typer.main.get_command(app)
    _with_whole_summaries(command)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="fewtune", title="The command line")
    target = Path(__file__).with_name("command-line.md")
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app: object) -> None:
    """Sphinx calls this first."""
    app.connect("builder-inited", write_command_line)  # type: ignore[attr-defined]
