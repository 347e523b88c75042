"""What a selection costs: the time of an importance pass in epochs of full fine-tuning, side by side in one process.

    python benchmarks/speed/importance.py                                            # ViT-S/16, batch 8
    python benchmarks/speed/importance.py --models vit_base_patch16_224 --device cuda --batch 32

An epoch is forward, backward and Adam's step on each batch. The contrastive objective sees every image twice, in two
views. `passes=2` forms the gradients of half of the layers at a time, for a model that hardly fits. Reading images is
left out of both. Results are added to docs/benchmarks/speed/importance.json; `report.py` makes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import fewtune
from methods import CLASSES, Timed, build, threads
from results import add_result
from training_step import clock, step_times

Batches = list[tuple[Tensor, Tensor]]


def ways(model: torch.nn.Module, batches: Batches) -> dict[str, Callable[[], object]]:
    """Name -> one importance pass over the batches."""
    views = [((images, images.flip(-1)), labels) for images, labels in batches]
    contrastive, entropy = fewtune.SupCon(), fewtune.CrossEntropy()
    return {
        "cross-entropy": lambda: fewtune.gradient_importance(model, batches, entropy),
        "contrastive, two views": lambda: fewtune.gradient_importance(model, views, contrastive),
        "the same, sums on the CPU": lambda: fewtune.gradient_importance(model, views, contrastive, store="cpu"),
        "the same, passes=2": lambda: fewtune.gradient_importance(model, views, contrastive, passes=2),
    }


def measure(architecture: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Way -> seconds of a pass, and epochs of full fine-tuning that it lasts."""
    device, now = arguments.device, clock("wall", arguments.device)
    size = (arguments.batch, 3, arguments.image_size, arguments.image_size)
    batches = [
        (torch.randn(size, device=device), torch.arange(arguments.batch, device=device) % min(CLASSES, 4))
        for _ in range(arguments.batches)
    ]
    full = build("full", architecture, device=device)
    passes = ways(build("full", architecture, device=device).model, batches)
    epochs: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(arguments.rounds + 1):
        epoch = _epoch(full, batches, now)
        measured = {name: _timed(run, now) for name, run in passes.items()}
        if turn:  # the first round warms up
            epochs.append(epoch)
            for name, value in measured.items():
                seconds[name].append(value)
    return {
        name: {
            "seconds": median(each),
            "epochs of full fine-tuning": median(a / b for a, b in zip(each, epochs, strict=True)),
        }
        for name, each in seconds.items()
    }


def _epoch(timed: Timed, batches: Batches, now: Callable[[], float]) -> float:
    return sum(sum(step_times(timed, images, labels, now)) for images, labels in batches)


def _timed(run: Callable[[], object], now: Callable[[], float]) -> float:
    start = now()
    run()
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for architecture in arguments.models:
        with threads(arguments.threads):
            figures = measure(architecture, arguments)
        for name, row in figures.items():
            print(f"{architecture}  {name:28s}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
        settings = {"model": architecture, "batch": arguments.batch}
        add_result("importance", arguments.device, arguments.threads, settings, figures)


if __name__ == "__main__":
    main()
