"""`fewtune demo`: the whole path on real weights, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning too (takes longer).")] = False,
    out: Annotated[Path, typer.Option(help="Where the runs are written.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Select, fine-tune, evaluate and apply a task file, beside a linear probe; weights and images come through pip."""
    from fewtune.cli.output import print_json, print_table, size
    from fewtune.demo import DATA, MODEL, NAMES, run
    from fewtune.metrics import percent

    found = run(out, full=full)
    if as_json:
        print_json(found)
        return
    print(f"\n{MODEL} on {DATA}")
    print_table(
        [
            {
                "method": NAMES[method],
                "trained parameters": f"{metrics['trained']:,}",
                "% of the backbone": f"{metrics['percent_of_backbone']:.3f}",
                "test accuracy, 95 % interval": percent(metrics["test"]["accuracy"]),
                "seconds": f"{metrics['seconds']:.0f}",
                "peak memory": size(metrics["peak_memory_bytes"]),
                "task file": size(metrics["delta_bytes"]),
            }
            for method, metrics in found["methods"].items()
        ]
    )
    print(f"GPS minus linear probe, in points, 95 % interval (paired bootstrap): {percent(found['gps minus linear'])}")
    print("\nThe GPS task file, applied in a fresh process:")
    print_table([{**row, "probability": f"{row['probability']:.3f}"} for row in found["predictions"]])
    task = out / "gps" / "delta.safetensors"
    print(f"{found['seconds']:.0f} seconds in all. Try it: fewtune predict --delta {task} FOLDER_OF_IMAGES")
