"""A backbone of 8-bit weights, and one of 4, beside float32: bytes, time of a step, accuracy.

    python benchmarks/speed/quantised.py PHOTOS                      # demo:vit-small at 70 px, K = 1; a few minutes
    python benchmarks/speed/quantised.py PHOTOS --keep float32 int8  # without bitsandbytes

"backbone" is what the parameters outside the head hold in memory, attached: quantised weights with their scales, and
the places and numbers that lie over them. "saved" is what a step saves for its backward pass, parameters excluded.
A step's time is of the process's own CPU time, the median over interleaved rounds. Accuracy is that of `fewtune fit`:
a few epochs, the test images read once. Results are added to docs/benchmarks/quantised.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.config import Recipe, recipe_from
from fewtune.models import load_backbone
from fewtune.quantised import Overlay
from fewtune.tasks import fit
from memory import SavedBytes
from methods import threads
from results import add_result

CLASSES = 10


def held(tensor: Any) -> int:
    """Bytes that a parameter holds."""
    if isinstance(tensor, Overlay):
        return held(tensor.base) + tensor.places.nbytes + tensor.entries.nbytes
    if (state := getattr(tensor, "quant_state", None)) is not None:
        return tensor.data.nbytes + state.absmax.nbytes + state.code.nbytes
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


class Attached:
    """A model with a selection by magnitude, and a step of Adam."""

    def __init__(self, recipe: Recipe) -> None:
        backbone = load_backbone(
            recipe.model, num_classes=CLASSES, image_size=recipe.image_size, quantise=recipe.quantise
        )
        self.model: nn.Module = backbone.model
        selection = fewtune.select(fewtune.magnitude_importance(self.model), k=recipe.k)
        self.tuner = fewtune.attach(self.model, selection)
        self.optimizer = torch.optim.Adam(self.tuner.parameters(), lr=recipe.lr)
        names = [name for name in selection.anatomy.shapes if name not in selection.head]
        self.backbone_bytes = sum(held(self.model.get_parameter(name)) for name in names)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        self.forward(images, labels).backward()
        self.optimizer.step()


def steps(recipes: dict[str, Recipe], rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, and milliseconds of a step, of every way to keep the weights."""
    attached = {keep: Attached(recipe) for keep, recipe in recipes.items()}
    recipe = next(iter(recipes.values()))
    images = torch.randn(recipe.batch_size, 3, recipe.image_size or 224, recipe.image_size or 224)
    labels = torch.randint(CLASSES, (recipe.batch_size,))
    times: dict[str, list[float]] = {keep: [] for keep in recipes}
    for _ in range(rounds + 1):  # the first sets things up
        for keep, one in attached.items():
            started = time.process_time()
            one.step(images, labels)
            times[keep].append(1000 * (time.process_time() - started))
    figures = {}
    for keep, one in attached.items():
        with SavedBytes(one.model) as saved:
            one.forward(images, labels)
        step = statistics.median(times[keep][1:])
        figures[keep] = {"backbone MB": one.backbone_bytes / 1e6, "saved MB": saved.total / 1e6, "step ms": step}
    return figures


def accuracy(recipe: Recipe) -> dict[str, float]:
    """Of the test images after training, with its interval."""
    with tempfile.TemporaryDirectory() as folder:
        result = fit(recipe, Path(folder) / "run")
    test = result.metrics["test"]["accuracy"]
    return {
        "accuracy": test["value"],
        "low": test["low"],
        "high": test["high"],
        "task kB": result.metrics["delta_bytes"] / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder or a list of images, as `fewtune fit --data` takes it")
    parser.add_argument("--model", default="demo:vit-small")
    parser.add_argument("--keep", nargs="+", default=["float32", "int8", "nf4"])
    parser.add_argument("--size", type=int, default=70, help="pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    arguments = parser.parse_args()
    common = {
        "model": arguments.model, "data": arguments.data, "image_size": arguments.size, "epochs": arguments.epochs,
        "k": 1.0, "lr": 3e-3, "cache": True, "accelerator": "cpu", "seed": arguments.seed, "report": False,
    }  # fmt: skip
    recipes = {keep: recipe_from(common | ({} if keep == "float32" else {"quantise": keep})) for keep in arguments.keep}
    settings = {
        "model": arguments.model, "data": Path(arguments.data).name, "size": arguments.size, "epochs": arguments.epochs,
        "batch": next(iter(recipes.values())).batch_size, "seed": arguments.seed,
    }  # fmt: skip
    with threads(arguments.threads):
        figures = steps(recipes, arguments.rounds)
        for keep, recipe in recipes.items():
            figures[keep] |= accuracy(recipe)
            print(f"{keep:8s}", "  ".join(f"{name} {value:.4g}" for name, value in figures[keep].items()), flush=True)
            if not arguments.dry:  # after each, so that a run that is stopped leaves what it has
                add_result("quantised", "cpu", arguments.threads, settings, figures)


if __name__ == "__main__":
    main()
