"""Time of one training step, method by method, side by side in one process.

    python benchmarks/speed/training_step.py                                   # ViT-S/16 and ConvNeXt-T, batch 8, eager
    python benchmarks/speed/training_step.py --models vit_base_patch16_224 --batch 32 --compile default
    python benchmarks/speed/training_step.py --random-columns                  # the worst case of a selection
    python benchmarks/speed/training_step.py --methods full "GPS K=1 reach 1/2" "GPS K=1 reach 1/2 kept"

Every round times one step of every method, one after the other in an order that rotates, so that whatever else the
machine does meets all alike. Figures are medians over rounds; ratios are medians of the ratios within a round.
Results are added to docs/benchmarks/speed/training_step.json; `report.py` makes the tables and plots.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median

import torch

import fewtune
from methods import CLASSES, PEERS, Timed, build, threads
from results import add_result

GPS = ("GPS K=1", "GPS K=2", "GPS K=5", "GPS K=10", "GPS K=20")
PHASES = ("forward", "backward", "optimizer")
BASES = ("full", "dense mask", "LoRA r=8", "bias-only", "frozen limit")


def clock(kind: str, device: str) -> Callable[[], float]:
    """Seconds, after all work queued on the device is done: of the wall, or of this process's own computing."""
    read = time.process_time if kind == "cpu" else time.perf_counter

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return read()

    return now


def step_times(timed: Timed, images: torch.Tensor, labels: torch.Tensor, now: Callable[[], float]) -> list:
    """Seconds of forward, backward and optimiser (with the clearing of gradients) of one step."""
    start = now()
    loss = timed.forward(images, labels)
    forward = now()
    loss.backward()
    backward = now()
    timed.step()
    timed.optimizer.zero_grad(set_to_none=True)
    return [forward - start, backward - forward, now() - backward]


def measure(architecture: str, methods: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Method -> milliseconds of each phase and of the step, and ratios of the step to that of the `BASES`."""
    size = arguments.image_size
    device, now = arguments.device, clock(arguments.clock, arguments.device)
    images = torch.randn(arguments.batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (arguments.batch,), device=device)
    timed_methods = []
    for method in methods:
        timed = build(method, architecture, random_columns=arguments.random_columns, device=device)
        if arguments.compile:
            timed.model.compile(mode=arguments.compile)
        timed_methods.append(timed)
    times: dict[str, list[list[float]]] = {method: [] for method in methods}
    warm_up = 3 if arguments.compile or device == "cuda" else 1
    for turn in range(warm_up + arguments.rounds):
        shift = turn % len(timed_methods)
        for timed in timed_methods[shift:] + timed_methods[:shift]:
            seconds = step_times(timed, images, labels, now)
            if turn >= warm_up:
                times[timed.name].append(seconds)
    del timed_methods
    gc.collect()
    return {method: _summary(method, times) for method in methods}


def _summary(method: str, times: dict[str, list[list[float]]]) -> dict[str, float]:
    steps = {name: [sum(phases) for phases in rounds] for name, rounds in times.items()}
    figures = {phase: 1e3 * median(each) for phase, each in zip(PHASES, zip(*times[method], strict=True), strict=True)}
    figures["step"] = 1e3 * median(steps[method])
    for base in BASES:
        if base in steps:
            figures[f"/ {base}"] = median(a / b for a, b in zip(steps[method], steps[base], strict=True))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "convnext_tiny"])
    parser.add_argument("--methods", nargs="+", default=[*PEERS, *GPS])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", metavar="MODE", help="torch.compile mode: default, reduce-overhead, …")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that is shared")
    parser.add_argument("--library", choices=["torch", "onednn"], default="torch", help="for matrices, of all methods")
    parser.add_argument("--random-columns", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    arguments = parser.parse_args()
    for architecture in arguments.models:
        with threads(arguments.threads), fewtune.matrix_library(arguments.library):
            figures = measure(architecture, arguments.methods, arguments)
        for method, row in figures.items():
            print(f"{architecture}  {method:14s}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if not arguments.dry:
            settings = {
                "model": architecture,
                "batch": arguments.batch,
                "columns": "uniformly random" if arguments.random_columns else "as measured",
                "mode": f"compiled ({arguments.compile})" if arguments.compile else "eager",
                "clock": arguments.clock,
                "library": arguments.library,
                "rounds": arguments.rounds,
            }
            add_result("training_step", arguments.device, arguments.threads, settings, figures)


if __name__ == "__main__":
    main()
