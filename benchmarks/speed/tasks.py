"""Size of a task file, and time to save, load, apply, revert and swap it, beside a whole checkpoint.

    python benchmarks/speed/tasks.py                                           # ViT-B/16, K = 1 and 10
    python benchmarks/speed/tasks.py --models vit_small_patch16_224 --ks 1

Two tasks are made by random values in place of training. Times are medians; revert is checked bit for bit. Results are
added to docs/benchmarks/speed/tasks.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fewtune
from methods import CLASSES, selection, threads
from results import add_result


def milliseconds(function: Callable[[], object], undo: Callable[[], object] | None, rounds: int) -> float:
    """Median time of a call; `undo` is called after each, outside the time."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
        if undo is not None:
            undo()
    return median(times[1:])


def task(model: nn.Module, k: int, seed: int) -> fewtune.Delta:
    """A task as training would leave it: every trained value moved a little; the model is left as it was."""
    tuner = fewtune.attach(model, selection(model, k, random_columns=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    delta = tuner.delta()
    tuner.detach(keep=False)
    return delta


def measure(architecture: str, k: int, rounds: int, folder: Path) -> dict[str, float]:
    """Bytes and milliseconds for K connections a neuron."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=CLASSES).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = task(model, k, 1), task(model, k, 2)
    file, whole = folder / "task.safetensors", folder / "whole.safetensors"
    figures = {
        "save": milliseconds(lambda: first.save(file), None, rounds),
        "load": milliseconds(lambda: fewtune.load_delta(file), None, rounds),
        "apply": milliseconds(lambda: first.apply(model), lambda: first.revert(model), rounds),
    }
    first.apply(model)
    figures["swap"] = milliseconds(lambda: first.swap(model, second), lambda: second.swap(model, first), rounds)
    figures["revert"] = milliseconds(lambda: first.revert(model), lambda: first.apply(model), rounds)
    first.revert(model)
    if not all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items()):
        raise SystemExit("revert was not exact")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    figures["save a checkpoint"] = milliseconds(lambda: save_file(state, whole), None, rounds)
    figures["load a checkpoint"] = milliseconds(lambda: model.load_state_dict(load_file(whole)), None, rounds)
    return figures | {"bytes": file.stat().st_size, "bytes of a checkpoint": whole.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    arguments = parser.parse_args()
    for architecture in arguments.models:
        with threads(arguments.threads), tempfile.TemporaryDirectory() as folder:
            figures = {f"GPS K={k}": measure(architecture, k, arguments.rounds, Path(folder)) for k in arguments.ks}
        for method, row in figures.items():
            print(f"{architecture}  {method}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if not arguments.dry:
            add_result("tasks", "cpu", arguments.threads, {"model": architecture}, figures)


if __name__ == "__main__":
    main()
