"""Runs scenarios in two processes on gloo, once for all tests of a file."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES = 2
PATIENCE = 400.0
"""Seconds after which the processes are ended; a busy machine takes long to start them."""

Scenario = Callable[[], Any]


class Results:
    """What each scenario returned in each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, name: str) -> list[Any]:
        """The results of a scenario by process; an error in a scenario fails the test that asks for it."""
        got = []
        for rank in range(PROCESSES):
            path = self.folder / f"{name}.{rank}.pt"
            assert path.exists(), f"process {rank} never came to {name}: {self.folder}"
            result = torch.load(path, weights_only=False)
            assert not isinstance(result, Failed), f"process {rank}:\n{result.trace}"
            got.append(result)
        return got


class Failed:
    def __init__(self, trace: str) -> None:
        self.trace = trace


def run(scenarios: Mapping[str, Scenario], folder: Path) -> Results:
    """Runs every scenario, in order, in two processes that are connected by gloo."""
    context = mp.start_processes(
        _process, args=(dict(scenarios), folder), nprocs=PROCESSES, join=False, start_method="spawn"
    )
    try:
        ends = time.monotonic() + PATIENCE
        while not context.join(timeout=1.0):
            assert time.monotonic() < ends, "the processes take too long"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return Results(folder)


def _process(rank: int, scenarios: dict[str, Scenario], folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120)
    )
    try:
        for name, scenario in scenarios.items():
            dist.barrier()
            try:
                result = scenario()
            except Exception:
                result = Failed(traceback.format_exc())
            torch.save(result, folder / f"{name}.{rank}.pt")
    finally:
        dist.destroy_process_group()
