"""A service under load on this machine: throughput beside the bank called directly, overload, memory.

    python benchmarks/speed/serving_load.py                       # 30 s each, a ViT-S/16 of random weights, 16 tasks
    python benchmarks/speed/serving_load.py --seconds 600         # memory over ten minutes

Three parts, one JSON line each. `direct`: images a second of the bank, called with full batches of prepared images.
`service`: as many clients as fill two batches, each asking again as soon as it is answered. `overload`: clients ask at
twice that rate, whether they are answered or not. Clients run in a process of their own and send small JPEG images.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from fewtune.allocator import keep_freed_memory
from fewtune.models import load_backbone
from fewtune.serving.limits import Limits
from fewtune.serving.opening import open_bank
from many_tasks import made_up_task

BATCH = Limits.batch


def write_tasks(folder: Path, model: str, tasks: int, size: int | None) -> None:
    backbone = load_backbone(model, num_classes=10, image_size=size, pretrained=False)
    for seed in range(tasks):
        metadata = {"backbone": backbone.describe(), "class_names": [f"class {i}" for i in range(10)]}
        replace(made_up_task(backbone.model, 1, seed), metadata=metadata).save(folder / f"task{seed}.safetensors")


def picture(seed: int, side: int = 256) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(file, format="JPEG")
    return file.getvalue()


def direct(folder: Path, seconds: float) -> float:
    """Images a second."""
    keep_freed_memory()
    opened = open_bank(folder)
    names = opened.bank.tasks()
    asked = [names[i % len(names)] for i in range(BATCH)]
    images = torch.stack([opened.prepare(n, Image.open(io.BytesIO(picture(i)))) for i, n in enumerate(asked)])
    opened.bank.predict(images, asked)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        opened.bank.predict(images, asked)
        done += BATCH
    return done / spent


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


async def load(port: int, names: list[str], seconds: float, rate: float | None) -> dict[str, Any]:
    """Requests as fast as they are answered (rate None), or so many a second."""
    statuses: Counter[int] = Counter()
    bodies = [picture(i) for i in range(16)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
        start = time.perf_counter()

        async def one(turn: int) -> None:
            reply = await client.post(f"/tasks/{names[turn % len(names)]}/predict", content=bodies[turn % 16])
            statuses[reply.status_code] += 1

        async def again(turn: int) -> None:
            while time.perf_counter() - start < seconds:
                await one(turn)
                turn += 2 * BATCH

        if rate is None:
            await asyncio.gather(*(again(turn) for turn in range(2 * BATCH)))
        else:
            asked = []
            for turn in range(int(rate * seconds)):
                await asyncio.sleep(start + turn / rate - time.perf_counter())
                asked.append(asyncio.create_task(one(turn)))
            await asyncio.gather(*asked)
        spent = time.perf_counter() - start
    return {"images a second": round(statuses[200] / spent, 2), "statuses": dict(statuses)}


def loaded(*arguments: Any) -> dict[str, Any]:
    return asyncio.run(load(*arguments))


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fewtune", "serve", "--tasks", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
            return process
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the service ended at once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="timm:vit_small_patch16_224")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as probe:
        folder = Path(temporary)
        write_tasks(folder, arguments.model, arguments.tasks, arguments.image_size)
        names = [f"task{i}" for i in range(arguments.tasks)]
        bank = direct(folder, arguments.seconds)
        print(json.dumps({"direct": {"images a second": round(bank, 2)}}), flush=True)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        service = start(folder, port)
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(loaded, (port, names, min(5.0, arguments.seconds), None))
                before = memory(service.pid)
                for part, rate in (("service", None), ("overload", 2 * bank)):
                    figures = pool.apply(loaded, (port, names, arguments.seconds, rate))
                    figures["/ direct"] = round(figures["images a second"] / bank, 3)
                    figures["memory / at first"] = round(memory(service.pid) / before, 3)
                    print(json.dumps({part: figures}), flush=True)
        finally:
            service.terminate()
            service.wait()


if __name__ == "__main__":
    main()
