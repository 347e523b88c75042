"""`fewtune fit-many`: several tasks on one backbone that share a part of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewtune.cli.options import AsJson


def fit_many(
    tasks: Annotated[Path, typer.Argument(help="The tasks, a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as share=0.25, k=4 or tasks.NAME.data=FOLDER")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the runs. Default: runs/ and the name of the file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a part that several tasks share, then each task's own part. The exit status is 1 if one failed."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.sharing import fit_many as run
    from fewtune.sharing import read_tasks

    folder = out or Path("runs") / tasks.stem
    outcome = run(read_tasks(tasks, settings or []), folder)
    summary = outcome.to_json()
    if as_json:
        print_json({"folder": str(folder), **summary})
    else:
        rows = [{"task": name, "accuracy": f"{100 * value:.1f} %"} for name, value in summary["tasks"].items()]
        if rows:
            print_table([*rows, {"task": "mean", "accuracy": f"{100 * summary['mean']:.1f} %"}], str(folder))
    if outcome.failed:
        raise typer.Exit(1)
