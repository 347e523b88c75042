"""`fewtune report`: one page of a run, or of several compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs. Several are compared with the first.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    pictures: Annotated[bool, typer.Option(help="For one run: show test images, if they are still there.")] = True,
) -> None:
    """Write one HTML page: where a model fails, what was selected, and what it cost, or how several runs differ."""
    from fewtune.report import write_report

    print(write_report(runs, out, pictures=pictures))
