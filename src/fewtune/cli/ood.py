"""`fewtune ood`: a task of ImageNet-1k on ImageNet-A, -R and -C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ood(
    delta: Annotated[Path, typer.Option(help="The task file; it must be of ImageNet-1k.")],
    data: Annotated[Path, typer.Option(help="The folder that holds imagenet-a/, imagenet-r/, imagenet-c/.")],
    sets: Annotated[list[str] | None, typer.Argument(help="imagenet-a, imagenet-r, imagenet-c; left out, all.")] = None,
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> None:
    """Accuracy on natural adversarial images (-A), renditions (-R) and corruptions (-C, with mCE)."""
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
