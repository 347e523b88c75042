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
    from fewtune.cli.output import percent, print_json, print_table
    from fewtune.demo import run

    def show(title: str, rows: list[dict[str, str]]) -> None:
        if not as_json:
            print(f"\n{title}")
            print_table(rows)

    found = run(out, full=full, show=show)
    if as_json:
        print_json(found)
        return
    print(f"GPS minus linear probe, in points, 95 % interval (paired bootstrap): {percent(found['gps minus linear'])}")
    print(f"{found['seconds']:.0f} seconds in all. The task file: {out / 'gps' / 'delta.safetensors'}")
    print(f"Try it: fewtune predict --delta {out / 'gps' / 'delta.safetensors'} FOLDER_OF_IMAGES")
