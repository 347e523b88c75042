"""`fewtune predict`: classes of images, from a task file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders that hold images.")],
    delta: Annotated[Path, typer.Option(help="The task file; it names its backbone.")],
    out: Annotated[Path | None, typer.Option(help="Write here (.csv or .json) and not to stdout.")] = None,
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON and not CSV.")] = False,
) -> None:
    """Prediction and probabilities of every image, as CSV or JSON."""
    import json
    import logging

    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise typer.BadParameter(f"--out must end in .csv or .json, got {out}")

    from fewtune.training import predict as run
    from fewtune.training.files import csv_text, write_text

    progress = logging.getLogger("fewtune").info
    rows = run(delta, images, batch_size=batch_size, workers=workers, accelerator=accelerator, progress=progress)
    json_wanted = as_json or (out is not None and out.suffix.lower() == ".json")
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if json_wanted else csv_text(rows)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
