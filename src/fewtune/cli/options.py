"""Options that several commands share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TASK_FILE = "The task file, or its address: hf://org/name, hf://org/name@revision, s3://… or gs://…"

TaskFile = Annotated[Path, typer.Argument(help=TASK_FILE)]
TaskFileOption = Annotated[Path | None, typer.Option(help=TASK_FILE)]
Accelerator = Annotated[str, typer.Option(help="cpu, gpu, mps, or auto: the fastest here.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images in a batch. Default: 32, and 1 for masks.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images. Default: as many as are useful.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
