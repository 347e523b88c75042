"""`fewtune export`: the tuned model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewtune.cli.options import AsJson


def export(
    task: Annotated[Path, typer.Argument(help="The task file.")],
    to: Annotated[
        str, typer.Option(help="What to write: checkpoint (a folder for timm or transformers), onnx or torch-export")
    ],
    out: Annotated[Path, typer.Option(help="The folder or the file to write (.onnx, .pt2).")],
    int8: Annotated[bool, typer.Option("--int8", help="Write 8-bit weights (with --to onnx).")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="With --int8: labelled images, to quantise convolutions too and to compare the accuracy."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits, if --data has no test images of its own.")] = 0,
    test_fraction: Annotated[
        float | None, typer.Option(help="Part of --data that was set aside for the test in training.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the tuned model for timm, transformers, onnxruntime or torch, and check that it predicts the same."""
    import logging

    from fewtune.cli.output import print_json
    from fewtune.export import export_task
    from fewtune.progress import size

    made = export_task(
        task, to, out, int8=int8, data=data, seed=seed, test_fraction=test_fraction,
        progress=logging.getLogger("fewtune").info,
    )  # fmt: skip
    if as_json:
        facts = {"bytes": made.size, "difference": made.difference, "accuracy": made.accuracy}
        print_json({"file": str(made.out), **facts, "load": list(made.lines)})
        return
    before = " before quantising" if int8 else ""
    print(f"{made.out}: {size(made.size)}, logits equal to the task's within {made.difference:.1g}{before}")
    if made.accuracy:
        values = made.accuracy
        print(
            f"accuracy on {values['images']:.0f} images: {100 * values['float32']:.1f} % in float32, "
            f"{100 * values['int8']:.1f} % in int8"
        )
    print("\nLoad it with:\n")
    print("\n".join(f"    {line}" for line in made.lines))
