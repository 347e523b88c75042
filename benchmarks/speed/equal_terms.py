"""What a step costs at full reach, in half of the blocks and in a quarter, against full, LoRA, biases, dense mask.

    python benchmarks/speed/equal_terms.py                   # two ViTs, ConvNeXt-T and EfficientNet-Lite0, batch 8
    python benchmarks/speed/equal_terms.py --library onednn  # the same with the other matrix library, for all methods

One matrix library and one memory format for all. "kept": what lies below the reach is not computed again
(`keep_prefix`). Times are medians over interleaved rounds, ratios medians of the ratios within a round. Saved for
backward are bytes, each method in a process of its own. Of twelve blocks 1/2 is 6; of networks with stages it is half
of these. Beside each ratio stands what is aimed at on transformers, where something is. Results are added to
training_step.json and memory.json in docs/benchmarks; `report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import fewtune
from memory import measured
from methods import threads
from results import add_result
from training_step import measure

MODELS = ("vit_base_patch16_224", "vit_small_patch16_224", "convnext_tiny", "efficientnet_lite0")
PEERS = ("full", "dense mask", "LoRA r=8", "bias-only")
GPS = ("GPS K=1", "GPS K=10", "GPS K=1 reach 1/2", "GPS K=1 reach 1/2 kept", "GPS K=1 reach 1/4 kept")
AIMS = {
    ("GPS K=1", "/ full"): 0.74,
    ("GPS K=1", "/ bias-only"): 1.08,
    ("GPS K=1 reach 1/2", "/ full"): 0.50,
    ("GPS K=1 reach 1/2", "saved / bias-only"): 0.55,
    ("GPS K=1 reach 1/2 kept", "/ full"): 0.36,
    ("GPS K=1 reach 1/4 kept", "/ full"): 0.20,
}
NEVER_SLOWER = 1.0
"""Than the dense mask, on any model."""


def saved(architecture: str, methods: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Method -> bytes of its step, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), "--here", "--models", architecture]
    command += ["--batch", str(arguments.batch), "--library", arguments.library, "--methods"]
    return {method: measured([*command, method]) for method in methods}


def row(method: str, times: dict[str, float], memory: dict[str, dict[str, int]], transformer: bool) -> list[str]:
    """One line of the table."""
    ratios = {key: value for key, value in times.items() if key.startswith("/")}
    if "bias-only" in memory:
        ratios["saved / bias-only"] = memory[method]["saved"] / memory["bias-only"]["saved"]
    cells = []
    for key in ("/ full", "/ bias-only", "/ LoRA r=8", "/ dense mask", "saved / bias-only"):
        aim = AIMS.get((method, key)) if transformer else None
        if method.startswith("GPS") and key == "/ dense mask":
            aim = NEVER_SLOWER
        cells.append(f"{ratios[key]:.2f}{f' ({aim:.2f})' if aim else ''}" if key in ratios else "")
    return [method, f"{times['step']:,.0f}", *cells, f"{memory[method]['saved'] / 2**20:,.1f}" if memory else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", choices=["torch", "onednn"], default="torch", help="for matrices, of all methods")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that is shared")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    arguments = parser.parse_args()
    fixed = {"image_size": 224, "device": "cpu", "random_columns": False, "compile": None}
    for architecture in arguments.models:
        methods = (*PEERS, *GPS)
        memory = {} if arguments.no_memory else saved(architecture, methods, arguments)
        with threads(arguments.threads), fewtune.matrix_library(arguments.library):
            times = measure(architecture, list(methods), argparse.Namespace(**vars(arguments), **fixed))
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(
            f"\n### {architecture}, batch {arguments.batch}, {arguments.threads} threads, {arguments.library}, {load}\n"
        )
        print("| | step, ms | / full | / biases | / LoRA | / dense mask | saved / biases | saved, MiB |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for method in methods:
            cells = row(method, times[method], memory, "vit" in architecture)
            print("| " + " | ".join(cells) + " |", flush=True)
        if not arguments.dry:
            settings = {"model": architecture, "batch": arguments.batch, "columns": "as measured"}
            library = {"library": arguments.library}
            step = {"mode": "eager", "clock": arguments.clock, **library, "rounds": arguments.rounds}
            add_result("training_step", "cpu", arguments.threads, {**settings, **step}, times)
            if memory:
                own = library if arguments.library != "torch" else {}
                add_result("memory", "cpu", arguments.threads, {**settings, **own}, memory)


if __name__ == "__main__":
    main()
