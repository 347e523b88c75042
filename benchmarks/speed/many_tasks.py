"""A batch of images of several tasks: one pass, a pass a task, PEFT's mixed adapters and the plain model.

    python benchmarks/speed/many_tasks.py                                   # ViT-S/16 and ViT-B/16, 1, 4 and 16 tasks
    python benchmarks/speed/many_tasks.py --clock cpu                       # for a machine that is shared

Every round times one batch of 16 images by every way, one after the other in an order that rotates, so that whatever
else the machine does meets all alike. Ratios are of the least times; the medians over rounds of the ratio within a
round stand beside them. Tasks are K connections of every neuron, chosen at random (no way here depends on which), with
biases and a head of 10 classes each; PEFT's are LoRA of rank 8 on every linear layer but the head, which all share.
Freed memory stays with the process, as in the service, so that no way is charged for what the system's pages cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fewtune
from fewtune.allocator import keep_freed_memory
from fewtune.delta import Delta, swap
from fewtune.serving import TaskBank

IMAGES, CLASSES, RANK = 16, 10, 8
Way = Callable[[], Any]


def made_up_task(model: nn.Module, k: int, seed: int) -> Delta:
    """Small changes of random connections; the model is as before."""
    tuner = fewtune.attach(model, fewtune.select(fewtune.random_importance(model, seed=seed), k=k))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    delta = tuner.delta()
    tuner.detach(keep=False)
    return delta


def swap_and_run(model: nn.Module, deltas: Sequence[Delta], images: Tensor) -> list[Tensor]:
    """Each task swapped in, without looking at the backbone again, and its images run."""
    outputs = []
    for delta, part in zip(deltas, images.chunk(len(deltas)), strict=True):
        swap(model, delta, verify="none")
        outputs.append(model(part))
    return outputs


def peft_mixed(model: nn.Module, tasks: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """PEFT's batch of mixed adapters, of images sorted by task; and the bytes of an adapter."""
    import peft

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_classifier()]
    config = peft.LoraConfig(r=RANK, target_modules=linear)
    mixed = peft.get_peft_model(model, config, adapter_name="0").eval()
    for task in range(1, tasks):
        mixed.add_adapter(str(task), config)
    held = sum(p.nbytes for n, p in mixed.named_parameters() if "lora_" in n) // tasks
    names = [str(i * tasks // IMAGES) for i in range(IMAGES)]
    return partial(mixed, adapter_names=names), held


def create(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=CLASSES).eval()


def ways(name: str, tasks: int, k: int) -> tuple[dict[str, Way], dict[str, int]]:
    """What is timed, by name; and the bytes of memory a task."""
    images = torch.randn(IMAGES, 3, 224, 224)
    plain, swapped, shared = create(name), create(name), create(name)
    deltas = [made_up_task(shared, k, seed) for seed in range(tasks)]
    bank = TaskBank(shared)
    for i, delta in enumerate(deltas):
        bank.add(str(i), delta)
    asked = [str(i * tasks // IMAGES) for i in range(IMAGES)]
    peft, held = peft_mixed(create(name), tasks)
    return {
        "plain": partial(plain, images),
        "mixed": partial(bank.logits, images, asked),
        "swap": partial(swap_and_run, swapped, deltas, images),
        "peft": partial(peft, images),
    }, {"mixed": bank.nbytes // tasks, "peft": held}


def timed(candidates: dict[str, Way], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each way by round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        names = list(candidates)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            candidates[name]()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def figures(seconds: dict[str, list[float]], held: dict[str, int]) -> dict[str, Any]:
    plain = seconds["plain"]
    return {
        name: {
            "ms": round(1e3 * min(times), 1),
            "/ plain": round(min(times) / min(plain), 3),
            "/ plain, median": round(median(a / b for a, b in zip(times, plain, strict=True)), 3),
            **({"bytes a task": held[name]} if name in held else {}),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for model in arguments.models:
        for tasks in arguments.tasks:
            candidates, held = ways(model, tasks, arguments.k)
            with torch.inference_mode():
                seconds = timed(candidates, arguments.rounds, clock)
            print(json.dumps({"model": model, "tasks": tasks, "k": arguments.k, **figures(seconds, held)}), flush=True)


if __name__ == "__main__":
    main()
