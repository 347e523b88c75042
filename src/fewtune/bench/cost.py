"""Cost of training and inference by method: the paper's cost figure (Sec. 4.2).

Batch 32, no mixed precision, VPT with 200 and 50 prompts. Times are of all methods side by side in one process: every
round times one step of each, one after the other in an order that rotates, so that whatever else the machine does
meets all alike; figures are medians over rounds. Memory is of a process for each method alone. Images are noise, so
the connections that GPS selects are those of noise; on photographs fewer input channels are touched.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.config import Recipe, recipe_from
from fewtune.errors import ConfigError, ModelError, TuningError
from fewtune.methods import METHODS, Tuner
from fewtune.methods.base import Batch, S
from fewtune.methods.reach import within_reach
from fewtune.models import Backbone, channels_last, load_backbone, logits
from fewtune.objectives import CrossEntropy, Objective, SupCon
from fewtune.progress import shown
from fewtune.training.loaders import pick_device
from fewtune.training.memory import held_memory, peak_memory, reset_peak_memory
from fewtune.tuning import MatrixLibrary, matrix_library

PAPER = ("full", "linear", "bias", "adapter", "lora", "vpt-shallow", "vpt-deep", "ssf", "gps")
"""The methods of the figure; their settings there are the defaults of a recipe."""


@dataclass(frozen=True)
class Setting:
    """What is measured on."""

    model: str
    batch: int = 32
    image_size: int | None = None
    classes: int = 100
    pretrained: bool = False
    accelerator: str = "auto"
    threads: int = 1
    library: MatrixLibrary = "torch"
    """By which all methods multiply float32 matrices on a CPU."""
    seed: int = 0

    def recipe(self, method: str) -> Recipe:
        """A recipe of a method with its published settings."""
        if method not in METHODS:
            raise ConfigError(f"no cost is known of '{method}'; there are {', '.join(METHODS)}")
        common = {"model": self.model, "image_size": self.image_size, "pretrained": self.pretrained, "seed": self.seed}
        return recipe_from({**common, "data": "noise", "method": method})

    def backbone(self) -> Backbone:
        """The plain model, the same on every call."""
        size, random = self.image_size, self.seed
        backbone = load_backbone(
            self.model, num_classes=self.classes, image_size=size, pretrained=self.pretrained, seed=random
        )
        channels_last(backbone.model)
        return backbone

    def batch_of_noise(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] and labels [B], the same on every call."""
        size = self.backbone().image_size
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randn(self.batch, 3, size, size, generator=generator)
        labels = torch.arange(self.batch) // 2 % self.classes  # pairs, so that the contrastive loss has positives
        return images.to(device), labels.to(device)


@dataclass(frozen=True)
class NoiseRun:
    """One batch of noise and a fresh model, as a method sees a run (`fewtune.methods.base.Run`)."""

    setting: Setting
    recipe: Recipe
    backbone: Backbone
    batch: tuple[Tensor, Tensor]

    @property
    def model(self) -> nn.Module:
        """The plain model."""
        return self.backbone.model

    @property
    def head(self) -> tuple[str, ...]:
        """Its head."""
        return self.backbone.head

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.batch[0].device

    @property
    def objective(self) -> Objective:
        """The paper's."""
        return SupCon()

    @property
    def loss(self) -> Objective:
        """Cross-entropy."""
        return CrossEntropy()

    @property
    def seed(self) -> int:
        """Of the setting."""
        return self.setting.seed

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.setting.classes

    def settings(self, kind: type[S]) -> S:
        """The recipe."""
        recipe = within_reach(self.recipe, self.model)
        assert isinstance(recipe, kind)
        return recipe

    def fresh_model(self) -> nn.Module:
        """The untouched model once more."""
        return self.setting.backbone().model

    def scored_model(self) -> nn.Module:
        """The plain model, where the batch lies."""
        return self.model.to(self.device)

    def scored_batches(self) -> Iterable[Batch]:
        """The one batch."""
        return [self.batch]

    training_batches = scored_batches

    def plain_batches(self, part: Literal["train", "val"]) -> Iterable[Batch] | None:
        """The one batch, and no validation images."""
        return [self.batch] if part == "train" else None


class Contender:
    """One method on one model, ready to train and to predict."""

    def __init__(self, name: str, setting: Setting, images: Tensor, labels: Tensor) -> None:
        method, backbone = METHODS[setting.recipe(name).method], setting.backbone()
        self.images, self.labels, self.setting = images, labels, setting
        self.model = backbone.model.to(images.device)
        run = NoiseRun(setting, setting.recipe(name), backbone, (images, labels))
        started = time.perf_counter()
        prepared = None if method.prepare is None else method.prepare(run, None)
        self.seconds_to_prepare = 0.0 if prepared is None else time.perf_counter() - started
        self.tuner: Tuner = method.attach(run, prepared)
        self.optimizer = torch.optim.Adam(self.tuner.param_groups(lr=1e-5))

    def train_step(self) -> None:
        """Forward, backward, one step of Adam."""
        self.model.train()
        F.cross_entropy(logits(self.model(self.images)), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def deployed(self) -> nn.Module:
        """The model as it is used after training: a plain one where the method can be worked into the weights."""
        try:
            merged = self.tuner.merged_state_dict()
        except TuningError:
            return self.model.eval()
        plain = self.setting.backbone().model.to(self.images.device)
        plain.load_state_dict(merged)
        return plain.eval()


def step_times(setting: Setting, methods: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Method -> trained, milliseconds of a training step and of inference on a batch, and seconds of selecting."""
    device = pick_device(setting.accelerator)
    torch.set_num_threads(setting.threads)
    images, labels = setting.batch_of_noise(device)
    candidates = {name: Contender(name, setting, images, labels) for name in methods}
    training = _interleaved({name: candidate.train_step for name, candidate in candidates.items()}, rounds, device)
    models = {name: candidate.deployed() for name, candidate in candidates.items()}

    def inference(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                model(images)

        return run

    predicting = _interleaved({name: inference(model) for name, model in models.items()}, rounds, device)
    return {
        name: {
            "trained": candidate.tuner.trained,
            "percent_of_backbone": 100 * candidate.tuner.trained / candidate.tuner.backbone_parameters,
            "train_ms": 1e3 * training[name],
            "inference_ms": 1e3 * predicting[name],
            "selection_seconds": candidate.seconds_to_prepare,
        }
        for name, candidate in candidates.items()
    }


def _interleaved(steps: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Name -> median seconds over rounds, after a round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in shown(range(rounds + 1), "rounds", rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = _now(device)
            steps[name]()
            taken[name].append(_now(device) - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(setting: Setting, method: str) -> dict[str, float]:
    """Bytes of a method beyond those of the plain model: the peak of a training step, and of inference on a batch.

    In a process of its own. On a CPU the resident set is counted, on a GPU what was allocated there.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_memory, args=(theirs, setting, method))
    process.start()
    theirs.close()
    try:
        figures: dict[str, float] = ours.recv()
        return figures
    except EOFError:
        process.join()
        why = "the reason stands above" if process.exitcode == 1 else "was there too little memory?"
        ended = f"its process ended with status {process.exitcode}"
        raise ModelError(f"{method} could not be measured: {ended}; {why}") from None
    finally:
        process.join()


def _memory(connection: Any, setting: Setting, method: str) -> None:
    device = pick_device(setting.accelerator)
    torch.set_num_threads(setting.threads)
    with matrix_library(setting.library):
        connection.send(_peaks(setting, method, device))
    connection.close()


def _peaks(setting: Setting, method: str, device: torch.device) -> dict[str, float]:
    images, labels = setting.batch_of_noise(device)
    candidate = Contender(method, setting, images, labels)
    figures = {"train_peak_bytes": _peak(candidate.train_step, device)}
    model = candidate.deployed()
    candidate.optimizer.state.clear()

    def predict() -> None:
        with torch.inference_mode():
            model(images)

    predict()  # libraries set up their own memory on the first call
    figures["inference_peak_bytes"] = _peak(predict, device)
    return figures


def _peak(step: Callable[[], None], device: torch.device) -> float:
    """Bytes that a step needs at its peak beyond what is held before it."""
    reset_peak_memory()
    before = held_memory()
    step()
    return float(max(0, peak_memory() - before))


def measure(setting: Setting, methods: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Method -> times and memory.

    Raises:
        ConfigError: a method is unknown.
        ModelError: a method does not know the model's architecture.
        TuningError: there is no such matrix library.
    """
    for method in methods:
        setting.recipe(method)
    with matrix_library(setting.library):  # which refuses a library that there is not
        spaces = {method: memory(setting, method) for method in shown(methods, "memory", len(methods))}
        times = step_times(setting, methods, rounds)
    return {method: {**times[method], **spaces[method]} for method in methods}
