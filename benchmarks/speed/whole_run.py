"""A whole run of each method, from the shell to the tested task: selection, epochs and test, each in a fresh process.

    python benchmarks/speed/whole_run.py IMAGES                       # EuroSAT's folder: 800 + 200 images, 30 epochs
    python benchmarks/speed/whole_run.py IMAGES --epochs 2 lr=3e-3    # shorter, or with other settings for all

Seconds are of the wall, the start of Python included; memory is the process's peak; accuracy is of the test images,
read once, with Wilson's interval. Learning rates are those of `METHODS` here; what `bench` would choose is in
docs/evidence.md. "kept" computes what lies below the reach anew: the cache that it fills is thrown away. Nothing is
recorded; a Markdown table is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fewtune.assets import cache_folder

METHODS: dict[str, list[str]] = {
    "full": ["method=full", "lr=1e-4"],
    "LoRA r=16": ["method=lora", "lr=1e-3"],
    "bias": ["method=bias", "lr=1e-3"],
    "GPS K=1": ["method=gps", "lr=1e-3"],
    "GPS K=1, settled": ["method=gps", "lr=1e-3", "settle=0.55"],
    "GPS K=1, reach 6": ["method=gps", "lr=1e-3", "reach=6"],
    "GPS K=1, reach 6, kept": ["method=gps", "lr=1e-3", "reach=6", "keep_prefix=float32", "settle=0.55"],
    "GPS K=1, reach 3, kept": ["method=gps", "lr=1e-3", "reach=3", "keep_prefix=float32", "settle=0.55"],
}


def run(name: str, common: list[str], model: str, data: Path, folder: Path) -> dict[str, Any]:
    """Seconds, peak memory and accuracy of one method, and seconds of its parts."""
    out = folder / name.replace(" ", "-").replace(",", "")
    cache = folder / f"{out.name}-cache"
    cache.mkdir()
    for file in cache_folder().glob("*"):
        if file.name != "prefixes":
            (cache / file.name).symlink_to(file)
    command = [
        sys.executable,
        "-m",
        "fewtune",
        "fit",
        "--model",
        model,
        "--data",
        str(data),
        "--out",
        str(out),
        "--json",
    ]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *METHODS[name], *common],
        capture_output=True,
        text=True,
        env={**os.environ, "FEWTUNE_CACHE": str(cache)},
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value, for all methods")
    parser.add_argument("--model", default="demo:vit-small")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_intermixed_args()
    common = [f"epochs={arguments.epochs}", f"image_size={arguments.image_size}", "cache=true", "report=false"]
    common += ["accelerator=cpu", *arguments.settings]
    print(f"{arguments.model}, {arguments.image_size} px, {arguments.epochs} epochs, {os.cpu_count()} cores\n")
    print("| | seconds | of full | training alone, s | peak memory, GB | trained | test accuracy, % |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    full = None
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.methods:
            measured = run(name, common, arguments.model, arguments.data, Path(folder))
            full = measured["seconds"] if name == "full" else full
            share = f"{measured['seconds'] / full:.2f}" if full else ""
            accuracy = {key: 100 * measured["test"]["accuracy"][key] for key in ("value", "low", "high")}
            cells = [name, f"{measured['seconds']:,.0f}", share, f"{measured['training_seconds']:,.0f}"]
            cells += [f"{measured['peak_memory_bytes'] / 1e9:.2f}", f"{measured['trained']:,}"]
            cells.append(f"{accuracy['value']:.1f} [{accuracy['low']:.1f}, {accuracy['high']:.1f}]")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
