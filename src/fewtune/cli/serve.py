"""`fewtune serve`: a folder of tasks behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewtune.cli.options import Accelerator

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    tasks: Annotated[Path, typer.Option(help="The folder of task files. It is watched while the service runs.")],
    backbone: Annotated[
        str | None, typer.Option(help="The backbone. Default: the one that the task files name.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at. Only this machine reaches the default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FEWTUNE_SERVE_TOKEN",
            help="A secret. Clients that send it may add and remove tasks; without one, nobody may.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The most images in one forward pass.")] = 16,
    wait_ms: Annotated[
        float, typer.Option(min=0, help="How long an image waits for others to share its forward pass, in ms.")
    ] = 5,
    queue: Annotated[
        int, typer.Option(min=1, help="How many images may wait. Further ones are answered with 503.")
    ] = 64,
    max_mb: Annotated[float, typer.Option(min=0.001, help="The largest request, in MB.")] = 20,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="The largest image, in megapixels.")] = 50,
    accelerator: Accelerator = "auto",
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve on a Ray cluster: that of RAY_ADDRESS, or one on this machine.")
    ] = False,
    replicas: Annotated[
        str, typer.Option(help="With --ray: how many replicas, such as 2, or 1:8 for as many as the requests need.")
    ] = "1",
    gpus: Annotated[
        float, typer.Option(min=0, help="With --ray: GPUs of each replica. 0.5 puts two replicas on one.")
    ] = 0,
) -> None:
    """Answer for all tasks of a folder over HTTP: POST an image to /tasks/NAME/predict, or open / in a browser."""
    import logging

    from fewtune.serving.limits import Limits
    from fewtune.serving.service import serve as run

    log = logging.getLogger("fewtune")
    limits = Limits(
        batch=batch,
        wait=wait_ms / 1000,
        queue=max(queue, batch),
        body=int(max_mb * 2**20),
        pixels=int(max_megapixels * 1e6),
    )
    if host not in LOOPBACK:
        log.warning("listening at %s: whoever reaches this machine can ask for predictions", host)
    options: dict[str, Any] = {"host": host, "port": port, "limits": limits, "token": token, "progress": log.info}
    if ray:
        from fewtune.serving.replicas import Replicas, serve_on_ray

        number = Replicas.of(replicas, gpus=gpus)
        serve_on_ray(tasks, backbone, replicas=number, accelerator=accelerator, **options)
        return
    if replicas != "1" or gpus:
        raise typer.BadParameter("--replicas and --gpus are of a Ray cluster; give --ray too")
    run(tasks, backbone, accelerator=accelerator, **options)
