"""`fewtune predict`: classes or masks of images, from a task file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewtune.cli.options import Accelerator, BatchSize, TaskFileOption, Workers

TABLES = (".csv", ".json")


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders that hold images.")],
    delta: TaskFileOption = None,
    tasks: Annotated[
        Path | None, typer.Option(help="A folder of task files of one backbone. All of them predict.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="With --tasks: the backbone. Default: the one that the task files name.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file (.csv or .json) instead of stdout. For masks: their folder.")
    ] = None,
    overlays: Annotated[bool, typer.Option(help="For masks: also write each image with its object tinted.")] = True,
    batch_size: BatchSize = None,
    workers: Workers = None,
    accelerator: Accelerator = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop if one image cannot be read, and predict nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of CSV.")] = False,
) -> None:
    """Predict the class of every image, with probabilities, as CSV or JSON. A segmentation task writes masks as PNG.

    If an image cannot be read, its row says why in the column `error`, and the exit status is 1.
    """
    import json
    import logging

    from fewtune.classification import CLASSIFICATION
    from fewtune.files import csv_text, write_text
    from fewtune.hub import resolve
    from fewtune.tasks import task_of

    if (delta is None) == (tasks is None):
        raise typer.BadParameter("expected either --delta FILE or --tasks FOLDER")
    if delta is not None and backbone is not None:
        raise typer.BadParameter(f"--backbone goes with --tasks, and a task file names its own, got {backbone}")
    if tasks is not None and workers is not None:
        raise typer.BadParameter(f"--workers goes with --delta: --tasks decodes in this process, got {workers}")
    suffix = "" if out is None else out.suffix.lower()
    if out is not None and suffix and suffix not in TABLES and not out.is_dir():
        raise typer.BadParameter(f"--out must end in .csv or .json, or be a folder for masks, got {out}")
    if delta is not None and (fetched := resolve(delta)).origin is not None:
        logging.getLogger("fewtune").info("task file: %s", fetched)
        delta = fetched.path
    task = task_of(delta) if delta is not None else CLASSIFICATION
    options: dict[str, Any] = {
        "batch_size": batch_size, "accelerator": accelerator, "progress": logging.getLogger("fewtune").info
    }  # fmt: skip
    if task.draws:
        if out is None or suffix in TABLES:
            raise typer.BadParameter(f"a task of {task.name} draws masks: --out must be a folder for them, got {out}")
        options |= {"out": out, "overlays": overlays}
    elif out is not None and suffix not in TABLES:
        raise typer.BadParameter(f"a task of {task.name} is written to a .csv or .json file, got {out}")
    in_json = as_json or suffix == ".json"
    if tasks is not None:
        from fewtune.serving.predicting import predict_tasks

        rows = predict_tasks(
            tasks, images, backbone=backbone, strict=strict, **{**options, "batch_size": batch_size or 32}
        )
        if not in_json:  # classes differ from task to task, which a table cannot hold
            rows = [{key: value for key, value in row.items() if key != "probabilities"} for row in rows]
    else:
        decoding = {} if workers is None else {"workers": workers}
        rows = task.predict(delta, images, strict=strict, **options, **decoding)
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if in_json else csv_text(rows)
    if out is None or task.draws:
        print(text, end="")
    else:
        write_text(out, text)
    faulty = [row for row in rows if row.get("error")]
    if faulty:
        logging.getLogger("fewtune").warning(
            "%d of %d images could not be read: see the column error", len(faulty), len(rows)
        )
        raise typer.Exit(1)
