"""The service on one machine: the application under uvicorn."""

from __future__ import annotations

from pathlib import Path

from fewtune.allocator import keep_freed_memory, share_freed_memory
from fewtune.errors import MissingExtra, Progress
from fewtune.serving.limits import Limits
from fewtune.serving.opening import open_bank
from fewtune.training.loaders import pick_device

CONNECTIONS_PER_IMAGE = 4
"""Connections that may be open for each image that may wait: those beyond are answered 503 by uvicorn itself."""


def serve(
    tasks: str | Path,
    backbone: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    token: str | None = None,
    accelerator: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Serves a folder of tasks until it is told to stop (SIGINT, SIGTERM); what was begun is then answered.

    Raises:
        MissingExtra: the libraries of the service are not installed.
        DataError, ModelError: see `open_bank`.
    """
    try:
        import uvicorn

        from fewtune.serving.http import create_app
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "uvicorn", "serve") from None
    limits = limits or Limits()
    keep_freed_memory()
    share_freed_memory()
    opened = open_bank(tasks, backbone, device=pick_device(accelerator), progress=progress)
    if progress is not None:
        progress(f"{len(opened.bank.tasks())} tasks at http://{host}:{port} (Ctrl-C ends)")
    uvicorn.run(
        create_app(opened, limits, token),
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=10,
        limit_concurrency=CONNECTIONS_PER_IMAGE * limits.queue,
        timeout_graceful_shutdown=30,
    )
