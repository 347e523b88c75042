"""A whole run of each method, from the shell to the tested task: selection, epochs and test, each in a fresh process.

    python benchmarks/speed/whole_run.py IMAGES                       # EuroSAT's folder: 800 + 200 images, 30 epochs
    python benchmarks/speed/whole_run.py IMAGES --epochs 2 lr=3e-3    # shorter, or with other settings for all

Seconds are of the wall, the start of Python included; memory is the process's peak; accuracy is of the test images,
read once, with Wilson's interval. Learning rates are `RATES`: for EfficientNet-Lite0 what the grid of docs/evidence.md
chose on EuroSAT, for ViT-S a guess. "kept" computes what lies below the reach anew: the cache that it fills is thrown
away. Nothing is recorded; a Markdown table is printed.
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

RATES = {
    "demo:vit-small": {"full": 1e-4, "LoRA r=16": 1e-3, "bias": 1e-3, "GPS": 1e-3},
    "demo:efficientnet-lite0": {"full": 1e-3, "LoRA r=16": 3e-3, "bias": 3e-3, "GPS": 1e-3},
}
REACHES = {"demo:vit-small": (6, 3), "demo:efficientnet-lite0": (4, 2)}
"""About a half and a quarter: blocks of twelve, stages of seven."""
SETTLE = {"demo:vit-small": 0.55, "demo:efficientnet-lite0": 0.43}
"""With these about four of 25 batches are scored."""


def methods(model: str) -> dict[str, list[str]]:
    """The settings of each method, by its title."""
    rates, (half, quarter) = RATES[model], REACHES[model]
    settle = f"settle={SETTLE[model]}"
    gps = ["preset=paper", "method=gps", f"lr={rates['GPS']}"]  # else a folder of classes gets preset=best
    return {
        "full": ["method=full", f"lr={rates['full']}"],
        "LoRA r=16": ["method=lora", f"lr={rates['LoRA r=16']}"],
        "bias": ["method=bias", f"lr={rates['bias']}"],
        "GPS K=1": gps,
        "GPS K=1, settled": [*gps, settle],
        f"GPS K=1, reach {half}": [*gps, f"reach={half}"],
        f"GPS K=1, reach {half}, kept": [*gps, f"reach={half}", "keep_prefix=float32", settle],
        f"GPS K=1, reach {quarter}, kept": [*gps, f"reach={quarter}", "keep_prefix=float32", settle],
    }


def run(name: str, settings: list[str], model: str, data: Path, folder: Path) -> dict[str, Any]:
    """Seconds, peak memory and accuracy of one method, and seconds of its parts."""
    out = folder / name.replace(" ", "-").replace(",", "")
    cache = folder / f"{out.name}-cache"
    cache.mkdir()
    for file in cache_folder().glob("*"):
        if file.name != "prefixes":
            (cache / file.name).symlink_to(file)
    fit = [sys.executable, "-m", "fewtune", "fit", "--model", model, "--data", str(data), "--out", str(out), "--json"]
    started = time.perf_counter()
    done = subprocess.run(
        [*fit, *settings],
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
    parser.add_argument("--model", default="demo:vit-small", choices=list(RATES))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--methods", nargs="+", help="some of them, by their titles in the table")
    arguments = parser.parse_intermixed_args()
    arms = methods(arguments.model)
    if unknown := set(arguments.methods or ()) - set(arms):
        parser.error(f"there is no {'; '.join(sorted(unknown))}, expected some of: {'; '.join(arms)}")
    common = [f"epochs={arguments.epochs}", f"image_size={arguments.image_size}", "cache=true", "report=false"]
    common += ["accelerator=cpu", *arguments.settings]
    print(f"{arguments.model}, {arguments.image_size} px, {arguments.epochs} epochs, {os.cpu_count()} cores\n")
    print("| | seconds | of full | training alone, s | peak memory, GB | trained | test accuracy, % |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    full = None
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.methods or arms:
            measured = run(name, [*arms[name], *common], arguments.model, arguments.data, Path(folder))
            full = measured["seconds"] if name == "full" else full
            share = f"{measured['seconds'] / full:.2f}" if full else ""
            accuracy = {key: 100 * measured["test"]["accuracy"][key] for key in ("value", "low", "high")}
            cells = [name, f"{measured['seconds']:,.0f}", share, f"{measured['training_seconds']:,.0f}"]
            cells += [f"{measured['peak_memory_bytes'] / 1e9:.2f}", f"{measured['trained']:,}"]
            cells.append(f"{accuracy['value']:.1f} [{accuracy['low']:.1f}, {accuracy['high']:.1f}]")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
