"""SPT (He et al. 2023): sensitivity says where a budget of trained parameters goes.

The sensitivity of a parameter is how much one step of gradient descent on it alone lowers the loss; to first order
|g * delta| with delta = -lr * g, hence g^2, summed over batches of training images. Of the tau most sensitive
parameters of all blocks, those of one matrix are trained themselves ("unstructured"), unless they are so many that a
branch of the whole matrix is trained instead ("structured"): low-rank (SPT-LoRA), or a bottleneck behind it
(SPT-Adapter). That is from a tenth of the branch's own parameters on, the ratio of SPT's published runs on VTAB-1k. A
bias or norm is trained whole where a fifth of it is sensitive. tau is the one that brings the total nearest to the
budget. The class token is always trained, as in SPT's code.

Of SPT's code this differs in three points: a layer that makes queries, keys and values together is one matrix and not
three; a vector of which less than a fifth is sensitive stays frozen, where there its few entries are trained; and the
branches have no drop path of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewtune.errors import ModelError, TuningError
from fewtune.files import read_tensors, write_tensors
from fewtune.methods.adapter import ATTRIBUTE as ADAPTER
from fewtune.methods.adapter import Bottleneck, adapted
from fewtune.methods.blocks import find_blocks, find_trunk
from fewtune.methods.placing import Added, Method, place
from fewtune.neurons import Anatomy, Places, Role
from fewtune.objectives import CrossEntropy, Objective
from fewtune.selection import Selection

BATCHES = 8
"""Batches of training images that the sensitivity is summed over, as in SPT's code."""
MATRIX_SHARE, VECTOR_SHARE = 10, 5
"""A matrix is structured from a tenth of its branch's parameters on, a vector trained whole from a fifth of its own."""
STEPS = 100
LOW_RANK = "fewtune_low_rank"
VECTORS = (Role.BIAS, Role.NORM, Role.SCALE)

Structure = Literal["lora", "adapter"]


class LowRank(nn.Module):
    """B A x, with B zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.up(self.down(x))


def beside(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook: the layer's output and its low-rank branch's."""
    return output + getattr(layer, LOW_RANK)(inputs[0])


@dataclass(frozen=True, eq=False)
class SPT(Method):
    """Where the budget went.

    structure: what replaces the tuning of single connections where these would be many. rank: its inner width.
    structured: names of the linear layers that have it. whole: parameters trained whole. places: of other weights, the
    sensitive connections, flat in [neurons, fan_in], increasing.
    """

    structure: Structure
    rank: int
    structured: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    places: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:  # type: ignore[override]
        """spt-lora or spt-adapter."""
        return f"spt-{self.structure}"

    def settings(self) -> dict[str, Any]:
        """All but the places."""
        return {"rank": self.rank, "structured": list(self.structured), "whole": list(self.whole)}

    def arrays(self) -> dict[str, Tensor]:
        """The places."""
        return dict(self.places)

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> SPT:
        """The inverse of `name`, `settings` and `arrays`."""
        structure: Structure = "lora" if name == "spt-lora" else "adapter"
        return cls(structure, settings["rank"], tuple(settings["structured"]), tuple(settings["whole"]), dict(arrays))

    def save(self, path: Path) -> None:
        """Writes where the budget went, so that a resumed run need not find it again."""
        write_tensors(path, self.places, {"fewtune": json.dumps({"name": self.name, **self.settings()})})

    @classmethod
    def load(cls, path: Path) -> SPT:
        """Reads what `save` wrote. TuningError where it is something else."""
        arrays, header = read_tensors(path, TuningError)
        try:
            said = json.loads(header["fewtune"])
            return cls.from_settings(said.pop("name"), said, arrays)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TuningError(f"{path} does not say where SPT's budget went ({error})") from error

    def base(self, anatomy: Anatomy) -> Selection:
        """The head, the parameters trained whole, and the single connections."""
        for name in (*self.whole, *self.places):
            if name not in anatomy.shapes:
                raise ModelError(f"{self.name} was planned for another model: this one has no parameter {name}")
        views = anatomy.views
        places = {n: Places(views[n].neurons, views[n].fan_in, flat.long()) for n, flat in self.places.items()}
        dense = {role: tuple(n for n in self.whole if anatomy.roles.get(n) is role) for role in Role}
        return Selection(anatomy, places, {role: names for role, names in dense.items() if names})

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """The branch of every structured layer."""
        added: dict[str, nn.Module] = {}
        for name in self.structured:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if self.structure == "lora":
                branch = LowRank(layer.in_features, layer.out_features, self.rank)
                added |= place(layer, name, LOW_RANK, branch, beside, like=layer)
            else:
                bottleneck = Bottleneck(layer.out_features, self.rank)
                added |= place(layer, name, ADAPTER, bottleneck, adapted, like=layer)
        return Added(added)

    def fold(self, model: nn.Module, anatomy: Anatomy, plain: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """W + B A; None for SPT-Adapter with any adapter in it."""
        if self.structure == "adapter":
            return None if self.structured else {}
        folded = {}
        for name in self.structured:
            branch = getattr(model.get_submodule(name), LOW_RANK)
            folded[f"{name}.weight"] = plain[f"{name}.weight"] + branch.up.weight.detach() @ branch.down.weight.detach()
        return folded


def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    anatomy: Anatomy,
    objective: Objective | None = None,
    *,
    most: int = BATCHES,
) -> dict[str, Tensor]:
    """The squared gradient of a batch's loss, summed over at most `most` batches, of every parameter outside the head.

    The model runs in evaluation mode and is left as found. Under torch.distributed the processes' sums are added up.

    Args:
        model: plain, on the device of the batches.
        batches: of (images, labels).
        anatomy: of the model.
        objective: cross-entropy through the head as it stands, where it is left out.

    Raises:
        TuningError: there is no batch, or a gradient is not finite.
    """
    objective = objective or CrossEntropy()
    named = {n: p for n, p in model.named_parameters() if anatomy.roles.get(n) is not Role.HEAD}
    flags = {name: parameter.requires_grad for name, parameter in named.items()}
    device = next(iter(named.values())).device
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    training, seen = model.training, 0
    model.eval()
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        for images, labels in islice(batches, most):
            with torch.enable_grad():
                loss = objective(model, images.to(device), labels.to(device))
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.detach() ** 2
            seen += 1
    finally:
        model.train(training)
        for name, parameter in named.items():
            parameter.requires_grad_(flags[name])
    if not seen:
        raise TuningError("the sensitivity needs at least one batch of training images, and got none")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in total.values():
            torch.distributed.all_reduce(tensor)
    if broken := [name for name, tensor in total.items() if not bool(tensor.isfinite().all())]:
        raise TuningError(f"the gradient of {broken[0]} is not finite; look for NaN in the images")
    return {name: tensor.cpu() for name, tensor in total.items()}


def plan(
    found: Mapping[str, Tensor], model: nn.Module, anatomy: Anatomy, *, structure: Structure, budget: int, rank: int
) -> SPT:
    """Where a budget of parameters goes, head aside.

    Args:
        found: of `sensitivity`.
        model: the same model.
        anatomy: of it.
        structure: "lora" or "adapter".
        budget: parameters.
        rank: inner width of a branch.

    Raises:
        ModelError: the model has no block that is known. TuningError: the budget is less than the class token alone,
            or every sensitivity is zero.
    """
    names = candidates(model, anatomy, f"spt-{structure}")
    tokens = single_tokens(anatomy)
    spent = sum(math.prod(anatomy.shapes[name]) for name in tokens)
    if spent >= budget:
        raise TuningError(f"spt_budget={budget:,} is less than the class token's {spent:,}; raise it")
    views = anatomy.views
    scores = [(views[n].matrix(found[n]) if n in views else found[n]).flatten() for n in names]
    ends = torch.tensor([len(score) for score in scores]).cumsum(0)
    values, top = torch.cat(scores).topk(min(2 * budget, int(ends[-1])))
    top = top[values > 0]
    if not len(top):
        raise TuningError("the loss is sensitive to no parameter of the blocks; do they all lie behind a detach()?")
    owner = torch.bucketize(top, ends, right=True)
    costs = {name: _branch_cost(model, name, structure, rank) for name in names}

    def divided(tau: int) -> tuple[int, list[str], list[str], list[str]]:
        counts = torch.bincount(owner[:tau], minlength=len(names)).tolist()
        total, structured, whole, single = spent, [], [], []
        for name, count in zip(names, counts, strict=True):
            cost, size = costs[name], math.prod(anatomy.shapes[name])
            if name not in views:
                if count * VECTOR_SHARE >= size:
                    whole.append(name)
                    total += size
            elif cost is not None and count * MATRIX_SHARE >= cost:
                structured.append(name)
                total += cost
            elif count:
                single.append(name)
                total += count
        return total, structured, whole, single

    steps = sorted({math.ceil(len(top) * step / STEPS) for step in range(1, STEPS + 1)})
    tau = min(steps, key=lambda tau: abs(divided(tau)[0] - budget))
    _, structured, whole, single = divided(tau)
    places = {}
    for name in single:
        number = names.index(name)
        start = int(ends[number]) - len(scores[number])
        places[name] = (top[:tau][owner[:tau] == number] - start).sort().values
    layers = tuple(name.rpartition(".")[0] for name in structured)
    return SPT(structure, rank, layers, (*tokens, *whole), places)


def candidates(model: nn.Module, anatomy: Anatomy, method: str) -> list[str]:
    """What the budget may go to: weights and vectors of the blocks, and the encoder's other norms."""
    inside = tuple(f"{block.name}." for block in find_blocks(model, method))
    prefix, _ = find_trunk(model, method)
    return [
        name
        for name in anatomy.shapes
        if (name.startswith(inside) and (name in anatomy.views or anatomy.roles[name] in VECTORS))
        or (name.startswith(prefix) and anatomy.roles.get(name) is Role.NORM)
    ]


def single_tokens(anatomy: Anatomy) -> tuple[str, ...]:
    """Class tokens and their kin: embeddings of one token, [1, 1, width]."""
    return tuple(name for name in anatomy.named(Role.EMBEDDING) if anatomy.shapes[name][:-1] == (1, 1))


def _branch_cost(model: nn.Module, name: str, structure: Structure, rank: int) -> int | None:
    """Parameters of a branch of this weight; None where it can have none."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Linear) or not name.endswith("weight"):
        return None
    if structure == "lora":
        return rank * (layer.in_features + layer.out_features)
    return 2 * rank * layer.out_features + rank + layer.out_features
