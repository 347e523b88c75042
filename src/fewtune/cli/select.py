"""`fewtune select`: which connections would be trained, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def select(
    settings: Annotated[list[str] | None, typer.Argument(help="Recipes, YAML files and key=value settings.")] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, as in `fewtune fit`.")] = None,
    data: Annotated[str | None, typer.Option(help="The images, as in `fewtune fit`.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("selection.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was selected as JSON.")] = False,
) -> None:
    """Score and select connections without training them, save the selection, and show where it lies.

    `fewtune fit selection=FILE` trains it later.
    """
    from fewtune.cli.output import print_json
    from fewtune.recipes import read
    from fewtune.tasks import prepare
    from fewtune.training.tuners import choose, score

    recipe = read(settings or [], model=model, data=data)
    work = prepare(recipe)
    selection = choose(work, score(work))
    out.parent.mkdir(parents=True, exist_ok=True)
    selection.save(out)
    if as_json:
        numbers = {"connections": selection.connections, "trained": selection.trained, "fraction": selection.fraction}
        print_json({"file": str(out), **numbers, "per_layer": selection.per_layer()})
    else:
        print(selection.summary())
        print(f"saved: {out}")
