"""Write the recipes' YAML files from the table: python -m fewtune.recipes.write"""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml

from fewtune.recipes.table import ROWS, Row

WIDTH = 110


def render(row: Row) -> str:
    """The text of a recipe's file: what a user should know, then the settings."""
    figure = f"{row.paper} % ({row.table})" if row.paper else f"({row.table})"
    if row.name.startswith(("ood/", "kvasir-seg/")):
        figure = f"{row.paper} ({row.table})"
    known = {
        "command": f"fewtune fit {row.name} --data ROOT",
        "checkpoint": f"{row.checkpoint.model.partition(':')[2]} of {_library(row)}: {row.checkpoint.about}",
        "paper": figure + (f"; trained parameters {row.trained}" if row.trained else ""),
        "ours": "not yet measured",
    }
    lines = [f"# GPS on {row.title}", "#"]
    for key, text in known.items():
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"# {key:<11} ", subsequent_indent="#" + " " * 13)
    lines += ["#"]
    for note in row.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="# - ", subsequent_indent="#   ")
    settings = {
        "data": f"task:{row.data}",
        "model": row.checkpoint.model,
        "method": "gps",
        **row.settings,
        **row.checkpoint.settings,
    }
    return "\n".join(lines) + "\n" + yaml.safe_dump(settings, sort_keys=False)


def _library(row: Row) -> str:
    return {"timm": "timm", "hf": "transformers"}[row.checkpoint.model.partition(":")[0]]


def main(folder: Path = Path(__file__).parent) -> None:
    """Write every file of the table."""
    for row in ROWS.values():
        path = folder / f"{row.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(row), encoding="utf-8")


if __name__ == "__main__":
    main()
