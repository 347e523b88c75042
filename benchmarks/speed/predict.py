"""Prediction against a plain timm loop: images a second, side by side, and the time from the shell to the first one.

    python benchmarks/speed/predict.py IMAGES --delta TASK [--images 512] [--workers 0 2] [--rounds 3]
    python benchmarks/speed/predict.py IMAGES --delta TASK --start          # only the start, in fresh processes

IMAGES is a folder; TASK a task file of a timm or demo model. The plain loop is what timm's users write: the same model,
torchvision's Resize, ToTensor and Normalize, a DataLoader with the same workers, `torch.inference_mode()`. Rounds are
interleaved; medians are compared. The ratio is ours by theirs in images a second: 1 and above is at least as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fewtune.classification.loaded import LoadedClassifier, load_classifier
from fewtune.classification.predict import predict
from fewtune.data.images import image_files


class Plain(Dataset):
    """Images of files by torchvision's transforms."""

    def __init__(self, files: list[Path], task: LoadedClassifier) -> None:
        size = (task.backbone.image_size,) * 2
        how = transforms.InterpolationMode(task.backbone.interpolation)
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=how),
                transforms.ToTensor(),
                transforms.Normalize(task.backbone.mean, task.backbone.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[index]).convert("RGB"))


@torch.inference_mode()
def plain(files: list[Path], task: LoadedClassifier, batch: int, workers: int) -> None:
    """What timm's users write."""
    model = task.backbone.model.eval()
    loader = DataLoader(Plain(files, task), batch, num_workers=workers)
    torch.cat([model(images).softmax(1) for images in loader])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(files: list[Path], delta: Path, batch: int, workers: int, rounds: int) -> dict[str, float]:
    """Images a second of both, and their ratio: the median over rounds."""
    theirs = load_classifier(delta)  # a model of its own: ours may lie in memory otherwise
    task = load_classifier(delta)
    ways: dict[str, Callable[[], object]] = {
        "fewtune": lambda: predict(task, files, batch_size=batch, workers=workers, strict=False),
        "timm": lambda: plain(files, theirs, batch, workers),
    }
    for work in ways.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(ways[name]))
    rates = {name: len(files) / statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["fewtune"], times["timm"], strict=True))
    return {"workers": workers, **{name: round(rate, 1) for name, rate in rates.items()}, "ratio": round(ratio, 3)}


def start(file: Path, delta: Path, rounds: int) -> dict[str, float]:
    """Seconds from the shell to the end of one image's prediction, beside those of importing torch and timm alone."""
    commands = {
        "predict": [sys.executable, "-m", "fewtune", "predict", "--delta", str(delta), str(file)],
        "import timm": [sys.executable, "-c", "import timm"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    figures = {}
    for name, command in commands.items():
        walls, before = [], resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(rounds):
            walls.append(seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        computing = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / rounds
        figures |= {f"{name}, s": round(min(walls), 2), f"{name}, s of a core": round(computing, 2)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--delta", type=Path, required=True)
    parser.add_argument("--images", dest="number", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--start", action="store_true", help="measure the start alone")
    arguments = parser.parse_args()
    files = image_files([arguments.images])[: arguments.number]
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for workers in [] if arguments.start else arguments.workers:
        print(json.dumps(compare(files, arguments.delta, arguments.batch, workers, arguments.rounds)), flush=True)
    print(json.dumps(start(files[0], arguments.delta, arguments.rounds)))


if __name__ == "__main__":
    main()
