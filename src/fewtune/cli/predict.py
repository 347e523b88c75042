"""`fewtune predict`: classes or masks of images, from a task file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders that hold images.")],
    delta: Annotated[Path | None, typer.Option(help="The task file; it names its backbone.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="A folder of task files of one backbone: all of them.")] = None,
    backbone: Annotated[str | None, typer.Option(help="With --tasks; left out, the task files name it.")] = None,
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

    if (delta is None) == (tasks is None):
        raise typer.BadParameter("expected either --delta FILE or --tasks FOLDER")
    if out is not None and out.suffix and out.suffix.lower() not in (".csv", ".json") and not out.is_dir():
        raise typer.BadParameter(f"--out must end in .csv or .json, or be a folder for masks, got {out}")
    progress = logging.getLogger("fewtune").info
    common: dict[str, Any] = {"batch_size": batch_size or 32, "workers": workers, "accelerator": accelerator}
    if delta is not None and masks.of_masks(delta):
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

    from fewtune.training.files import csv_text, write_text

    json_wanted = as_json or (out is not None and out.suffix.lower() == ".json")
    if tasks is not None:
        from fewtune.serving.predicting import predict_tasks

        del common["workers"]
        rows = predict_tasks(tasks, images, backbone=backbone, progress=progress, **common)
        if not json_wanted:  # classes differ from task to task, which a table cannot hold
            rows = [{key: value for key, value in row.items() if key != "probabilities"} for row in rows]
    else:
        from fewtune.training import predict as run

        assert delta is not None
        rows = run(delta, images, progress=progress, **common)
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if json_wanted else csv_text(rows)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
