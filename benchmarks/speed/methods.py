"""The ways of fine-tuning that the benchmarks compare, each built on a model of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.importance import Scores
from fewtune.methods.reach import count_units, find_border
from fewtune.models import channels_last
from fewtune.training.shortcut import Shortcut
from fewtune.tuning import add_noise
from fewtune.tuning.layers import Tuned
from fewtune.tuning.reference import DenseMask

CLASSES = 100
HOT_COLUMNS = json.loads((Path(__file__).parent / "hot_columns.json").read_text())
PEERS = ("full", "dense mask", "bias-only", "frozen limit", "LoRA r=8", "SHiRA", "SuperTuning")


@dataclass
class Timed:
    """A model made ready for one way of fine-tuning it.

    after_backward: what the way does to gradients before the optimiser's step.
    held: what the way holds beside the model's own tensors and what it trains: indices, masks, original values.
    """

    name: str
    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    after_backward: Callable[[], None] = lambda: None
    held: list[Tensor] = field(default_factory=list)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)

    def step(self) -> None:
        """The optimiser's step with what the way does before it."""
        self.after_backward()
        self.optimizer.step()


def build(method: str, architecture: str, *, random_columns: bool = False, device: str = "cpu") -> Timed:
    """One way of fine-tuning a randomly initialised timm model.

    Args:
        method: one of `PEERS`, or "GPS K=k"; the same columns in all neurons of a layer "GPS K=k columns"; of the last
            half of the blocks or stages "GPS K=k reach 1/2", with what lies below it kept "GPS K=k reach 1/2 kept";
            with noise on what changed "GPS K=k noise".
        architecture: timm name.
        random_columns: GPS and the dense mask choose uniformly random connections (the worst case) instead of as
            many hot columns as were measured on a pretrained model.
        device: where the model lies.
    """
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=CLASSES).to(device).train()
    model = channels_last(model)
    if method.startswith("GPS K="):
        return _gps(method, model, random_columns=random_columns)
    if method == "dense mask":
        mask = DenseMask(model, selection(model, 1, random_columns=random_columns))
        return Timed(
            method,
            model,
            trained := mask.parameters(),
            _adam(trained),
            mask.mask_gradients,
            [m for _, m, _ in mask.masked],
        )
    model = _prepared(method, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [buffer for name, buffer in model.named_buffers() if "supertuning" in name]
    for module in model.modules():
        held += getattr(module, "shira_indices", {}).values()
    return Timed(method, model, trained, _adam(trained), held=held)


@dataclass
class Kept(Timed):
    """With what lies below the border computed once for each batch of images, as `keep_prefix` does."""

    shortcut: Shortcut | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        assert self.shortcut is not None
        if id(images) not in self.rows:
            self.rows[id(images)] = self.shortcut.below(images)
        return F.cross_entropy(self.shortcut.above(self.rows[id(images)]), labels)


def _gps(method: str, model: nn.Module, *, random_columns: bool) -> Timed:
    """By its name: K, the part of the blocks or stages that is trained, and whether what lies below is kept."""
    words = method.removeprefix("GPS K=").split()
    border, below = None, ()
    if "reach" in words:
        units, part = count_units(model), Fraction(words[words.index("reach") + 1])
        border = find_border(model, max(1, round(units * part)))
        below = border.frozen
    if "columns" in words:
        chosen = fewtune.select(fewtune.random_importance(model), k=int(words[0]), granularity="columns", exclude=below)
    else:
        chosen = selection(model, int(words[0]), random_columns=random_columns, exclude=below)
    tuner = fewtune.attach(model, chosen)
    add_noise(tuner, 1.0 if "noise" in words else 0.0)
    for module in border.below.values() if border else ():
        module.eval()
    common: dict[str, Any] = {"held": _held_by(tuner)}
    trained = tuner.parameters()
    if border is None or "kept" not in words:
        return Timed(method, model, trained, _adam(trained), **common)
    return Kept(method, model, trained, _adam(trained), shortcut=Shortcut(model, border), **common)


def _held_by(tuner: fewtune.Tuner) -> list[Tensor]:
    """What a tuner holds: where the selected connections lie, and the original values of all that is trained."""
    held = [trained.before for trained in tuner._trained.values()]
    for module in tuner.model.modules():
        for tuned in module._fewtune.tuned.values() if isinstance(module, Tuned) else ():
            held += [value for value in (tuned.index, *vars(tuned.places).values()) if isinstance(value, Tensor)]
    return held


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-5)


def _prepared(method: str, model: nn.Module) -> nn.Module:
    """The model with the parameters that a method trains, and no others, requiring gradients."""
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    if method == "full":
        return model
    if method == "bias-only":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or id(parameter) in head)
        return model
    if method == "frozen limit":
        first = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == first)
        return model
    return _peft(method, model)


def _peft(method: str, model: nn.Module) -> nn.Module:
    """PEFT's methods on every linear layer but the head (where a model has none, on dense convolutions)."""
    import peft

    classifier = model.get_classifier()
    layers = {name: module for name, module in model.named_modules() if module is not classifier}
    targets = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    if not targets and method == "LoRA r=8":
        dense = (name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == 1)
        targets = list(dense)  # PEFT knows no grouped ones of this rank
    head = next(name for name, module in model.named_modules() if module is classifier)
    common: dict[str, Any] = {"target_modules": targets, "modules_to_save": [head]}
    match method:
        case "LoRA r=8":
            config = peft.LoraConfig(r=8, **common)
        case "SHiRA":
            config = peft.ShiraConfig(r=1, **common)
        case "SuperTuning":
            config = peft.SupertuningConfig(sparsity=0.99, **common)
        case _:
            raise ValueError(f"unknown method {method!r}")
    return peft.get_peft_model(model, config)


def selection(model: nn.Module, k: int, *, random_columns: bool, exclude: tuple[str, ...] = ()) -> fewtune.Selection:
    """K connections of every neuron; of every layer as many hot columns, as unevenly used, as were measured.

    `hot_columns.json` holds, for each kind of layer of a pretrained ViT-S, the share of distinct columns that a
    gradient selection touches and how many neurons use each; layers of other kinds take those of its patch
    convolution. Which columns are hot is random.
    """
    scores = fewtune.random_importance(model, seed=k)
    if random_columns:
        return fewtune.select(scores, k=k, exclude=exclude)
    measured = HOT_COLUMNS["k"][str(k)]
    generator = torch.Generator().manual_seed(k)
    skewed = {}
    for name, view in scores.anatomy.views.items():
        kind = measured.get(name.removesuffix(".weight").rpartition(".")[2], measured["other"])
        kind = measured["other"] if "patch_embed" in name else kind
        skewed[name] = view.stored(_uneven(view.matrix(scores[name]), k, kind, generator))
    return fewtune.select(Scores(skewed, scores.anatomy), k=k, exclude=exclude)


def _uneven(uniform: Tensor, k: int, kind: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Scores [neurons, fan_in] whose top K columns are drawn with the measured frequencies (Gumbel's top-k trick)."""
    neurons, fan_in = uniform.shape
    hot = min(fan_in, max(k, round(kind["share"] * fan_in)), neurons * k)
    steps = np.linspace(0, 1, len(kind["usage"]))
    frequency = torch.from_numpy(np.interp(np.linspace(0, 1, hot), steps, kind["usage"])).float()
    gumbel = -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()
    columns = torch.randperm(fan_in, generator=generator)[:hot]
    scores = torch.zeros_like(uniform)
    scores[:, columns] = (gumbel[:, columns] + frequency.log()).exp()
    # Every hot column is used at least once, by a neuron of its own as far as there are enough.
    owners = torch.randperm(neurons, generator=generator)[torch.arange(hot) % neurons]
    scores[owners, columns] = scores.max() + 1
    return scores


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Within, torch computes on this many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
