"""`fewtune ood`: a task of ImageNet-1k on ImageNet-A, -R and -C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewtune.cli.options import Accelerator, AsJson


def ood(
    delta: Annotated[Path, typer.Option(help="The task file; it must be of ImageNet-1k.")],
    data: Annotated[Path, typer.Option(help="The folder that holds imagenet-a/, imagenet-r/, imagenet-c/.")],
    sets: Annotated[
        list[str] | None, typer.Argument(help="Which sets: imagenet-a, imagenet-r, imagenet-c. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    accelerator: Accelerator = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a task of ImageNet-1k on ImageNet-A (natural adversarial), -R (renditions), -C (corruptions, mCE)."""
    import logging

    from fewtune.classification.ood import score_task
    from fewtune.cli.output import print_json
    from fewtune.metrics import percent

    keys = sets or ["imagenet-a", "imagenet-r", "imagenet-c"]
    progress = logging.getLogger("fewtune").info
    results = score_task(
        delta, keys, data, batch_size=batch_size, workers=workers, accelerator=accelerator, progress=progress
    )
    if as_json:
        print_json(results)
        return
    for key, scores in results.items():
        if "mce" in scores:
            print(f"{key}    mean accuracy {100 * scores['accuracy']:.2f} %, mCE {100 * scores['mce']:.2f}")
        else:
            among = f"{100 * scores['accuracy_among_all_outputs']:.2f} %"
            print(f"{key}    accuracy, 95 % interval {percent(scores['accuracy'])} %; among all outputs {among}")
