"""`fewtune demo`: the whole path on real weights and images, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    full: Annotated[bool, typer.Option("--full", help="Compare with full fine-tuning too.")] = False,
    out: Annotated[Path, typer.Option(help="Where the runs are written.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Show the whole way on real images: GPS beside a linear probe and random connections."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.demo import DATA, MODEL, run
    from fewtune.metrics import percent

    result = run(out, full=full)
    if as_json:
        print_json(result)
        return
    print(f"\n{MODEL} on {DATA}")
    print_table([_measured(result["arms"][arm], metrics) for arm, metrics in result["methods"].items()])
    for arm, title in result["arms"].items():
        if arm != "gps":
            gain = percent(result[f"gps minus {arm}"])
            print(f"GPS minus {title}, in points, 95 % interval (paired bootstrap): {gain}")
    print("\nRecall of each class, %, with 95 % intervals (Wilson):")
    print_table(
        [
            {"class": name, "test images": str(row["images"])}
            | {title: percent(row[arm]) for arm, title in result["arms"].items()}
            for name, row in result["recall"].items()
        ]
    )
    print("The GPS task file, applied in a fresh process:")
    print_table([{**row, "probability": f"{row['probability']:.3f}"} for row in result["predictions"]])
    task = out / "gps" / "delta.safetensors"
    print(f"{result['seconds']:.0f} seconds in all. Try it: fewtune predict --delta {task} FOLDER_OF_IMAGES")


def _measured(title: str, metrics: dict[str, Any]) -> dict[str, str]:
    """An arm's line of the table."""
    from fewtune.metrics import percent
    from fewtune.progress import size

    return {
        "method": title,
        "trained parameters": f"{metrics['trained']:,}",
        "% of the backbone": f"{metrics['percent_of_backbone']:.3f}",
        "test accuracy, 95 % interval": percent(metrics["test"]["accuracy"]),
        "seconds": f"{metrics['seconds']:.0f}",
        "peak memory": size(metrics["peak_memory_bytes"]),
        "task file": size(metrics["delta_bytes"]),
    }
