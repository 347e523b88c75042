"""`fewtune export`: the tuned model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    task: Annotated[Path, typer.Argument(help="The task file.")],
    to: Annotated[str, typer.Option(help="checkpoint (a folder for timm or transformers), onnx or torch-export")],
    out: Annotated[Path, typer.Option(help="The folder, or the file (.onnx, .pt2).")],
    int8: Annotated[bool, typer.Option("--int8", help="Of onnx: 8-bit weights.")] = False,
    data: Annotated[str | None, typer.Option(help="With --int8: labelled images; accuracy before and after.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits, where the data is split here.")] = 0,
    test_fraction: Annotated[float | None, typer.Option(help="As when the task was trained.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write the tuned model for timm, transformers, onnxruntime or torch, checked against the task's predictions."""
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
