"""A small model of many layer kinds, selections drawn at random, and the delta of a tuning that is made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fewtune
from fewtune.delta import Delta, frozen_buffers, take
from fewtune.neurons import Anatomy, Places, View, describe
from fewtune.selection import Selection


class Small(nn.Module):
    """Linear, grouped, depthwise and transposed convolutions, a weight stored as its transpose, norms, a head."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(6, 4, (1, 3), groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.batch_norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(9, 7)
        self.columns = nn.Linear(5, 8)
        self.wide = nn.Linear(70, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, classes)
        nn.init.normal_(self.batch_norm.running_mean)


def anatomy_of(model: nn.Module) -> Anatomy:
    """The model's anatomy, with one linear layer taken as a weight of shape [fan_in, neurons]."""
    anatomy = describe(model, head="head")
    shape = anatomy.views["columns.weight"].shape
    return replace(anatomy, views={**anatomy.views, "columns.weight": View(shape, "columns")})


def choose(anatomy: Anatomy, how: str | int, seed: int = 0) -> Selection:
    """A random selection: K connections of every neuron; "ragged": any; "all"; "one": a single connection."""
    generator = torch.Generator().manual_seed(seed)
    places = {}
    for name, view in anatomy.views.items():
        scores = torch.rand(view.neurons, view.fan_in, generator=generator)
        match how:
            case int():
                mask = torch.zeros_like(scores, dtype=torch.bool)
                mask.scatter_(1, scores.topk(min(how, view.fan_in)).indices, True)
            case "ragged":
                mask = scores < torch.rand((), generator=generator) ** 3
            case "all":
                mask = torch.ones_like(scores, dtype=torch.bool)
            case _:
                mask = scores == scores.max() if name == "wide.weight" else torch.zeros_like(scores, dtype=torch.bool)
        if bool(mask.any()):
            places[name] = Places.from_mask(mask)
    dense = {role: anatomy.named(role) for role in anatomy.roles.values() if role in ("bias", "scale")}
    return Selection(anatomy, places, dense)


@dataclass(frozen=True)
class Task:
    """A delta beside all that it is made of: the tuned and the original tensors of the whole model."""

    delta: Delta
    tuned: Mapping[str, Tensor]
    original: Mapping[str, Tensor]


def made_up(
    model: nn.Module, selection: Selection, seed: int = 1, buffers: bool = False, metadata: dict | None = None
) -> Task:
    """What training might have given: other values wherever the selection trains, all else as it is."""
    generator = torch.Generator().manual_seed(seed)
    original = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    tuned = {name: tensor.clone() for name, tensor in original.items()}
    before = {}

    def drawn(count: int, like: Tensor) -> Tensor:
        return torch.randn(count, generator=generator).to(like.device, like.dtype)

    for name, places in selection.places.items():
        index = selection.anatomy.views[name].stored_index(places.flat).to(tuned[name].device)
        at = torch.unravel_index(index, tuned[name].shape)
        before[name] = tuned[name][at]
        tuned[name][at] = drawn(len(places), tuned[name])
    for name in (*selection.whole, *selection.head):
        before[name] = original[name]
        tuned[name] = drawn(tuned[name].numel(), tuned[name]).view(tuned[name].shape)
    changed = ["batch_norm.running_mean", "batch_norm.num_batches_tracked"] if buffers else []
    for name in changed:
        tuned[name] = tuned[name] + 3
    delta = take(
        selection,
        {name: tuned[name] for name, _ in model.named_parameters()},
        before,
        buffers={name: tuned[name] for name in changed},
        buffers_before={name: original[name] for name in changed},
        frozen={name: b for name, b in frozen_buffers(model).items() if name not in changed},
        metadata=metadata,
    )
    return Task(delta, tuned, original)


def random_task(model: nn.Module, k: int = 1, seed: int = 0) -> Task:
    """A made-up tuning of a model that says which module is its head."""
    return made_up(model, fewtune.select(fewtune.random_importance(model, seed=seed), k=k), seed + 1)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and t.shape == other[n].shape and bits(t) == bits(other[n]) for n, t in one.items()
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
