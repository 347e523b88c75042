"""`fewtune predict`: classes or masks of images, from a task file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders that hold images.")],
    delta: Annotated[Path, typer.Option(help="The task file; it names its backbone.")],
    out: Annotated[
        Path | None, typer.Option(help="Write here (.csv or .json) and not to stdout; for masks: their folder.")
    ] = None,
    overlays: Annotated[bool, typer.Option(help="For masks: also each image with its object tinted.")] = True,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Left out: 32, and 1 for masks.")] = None,
    workers: int = 0,
    accelerator: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON and not CSV.")] = False,
) -> None:
    """Prediction and probabilities of every image, as CSV or JSON; of a segmentation task, masks as PNG."""
    import json
    import logging

    from fewtune.cli import masks

    if out is not None and out.suffix and out.suffix.lower() not in (".csv", ".json") and not out.is_dir():
        raise typer.BadParameter(f"--out must end in .csv or .json, or be a folder for masks, got {out}")
    progress = logging.getLogger("fewtune").info
    common: dict[str, Any] = {"batch_size": batch_size or 32, "workers": workers, "accelerator": accelerator}
    if masks.of_masks(delta):
        masks.predict(
            delta,
            images,
            out,
            as_json=as_json,
            overlays=overlays,
            progress=progress,
            **{**common, "batch_size": batch_size or 1},
        )
        return
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise typer.BadParameter(f"a task of classification is written to a .csv or .json file, got {out}")

    from fewtune.training import predict as run
    from fewtune.training.files import csv_text, write_text

    rows = run(delta, images, progress=progress, **common)
    json_wanted = as_json or (out is not None and out.suffix.lower() == ".json")
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if json_wanted else csv_text(rows)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
