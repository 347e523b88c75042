"""`fewtune recipes list | show`: the rows of the paper's tables, ready to run."""

from __future__ import annotations

from typing import Annotated

import typer

from fewtune.cli.options import AsJson

app = typer.Typer(help="List and show the recipes of the paper's tables. `fewtune fit RECIPE --data ROOT` runs one.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List all recipes with the paper's results."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.recipes.table import ROWS

    rows = [
        {"recipe": row.name, "model": row.checkpoint.model.removeprefix("timm:"), "paper, %": row.paper or "",
         "table": row.table, "ours": "not yet measured"}
        for row in ROWS.values()
    ]  # fmt: skip
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


@app.command("show")
def show(recipe: Annotated[str, typer.Argument(help="A recipe's name, or a preset's: paper, fast, best.")]) -> None:
    """Show a recipe: its command, checkpoint, results of the paper, and settings; or what a preset sets."""
    from fewtune.config import presets
    from fewtune.config.presets import shown
    from fewtune.recipes import recipe_file

    if recipe in presets():
        print(shown(recipe), end="")
        return
    print(recipe_file(recipe).read_text(encoding="utf-8"), end="")
