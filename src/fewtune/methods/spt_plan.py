"""Where SPT's budget goes: the sensitivity of every parameter, and a plan from it (see `fewtune.methods.spt`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from pydantic import Field
from torch import Tensor, nn

from fewtune.errors import TuningError
from fewtune.importance import Scores, accumulate, left_as_found, reduce_over_processes
from fewtune.methods.base import Batch, Excluding, Method, Prepared, Run
from fewtune.methods.blocks import find_blocks, find_trunk
from fewtune.methods.inserted import Inserted
from fewtune.methods.lora import Rank
from fewtune.methods.spt import SPT, Structure
from fewtune.neurons import Anatomy, Role, describe, excluded
from fewtune.objectives import CrossEntropy, Objective

RANK = 8
"""The inner width of the branches where the recipe says none."""
BATCHES = 8
"""Batches of training images that the sensitivity is summed over, as in SPT's code."""
MATRIX_SHARE, VECTOR_SHARE = 10, 5
"""A matrix is structured from a tenth of its branch's parameters on, a vector trained whole from a fifth of its own."""
STEPS = 100
log = logging.getLogger("fewtune")
VECTORS = (Role.BIAS, Role.NORM, Role.SCALE)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
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
    with left_as_found(model, train_mode=False):
        read = iter(batches)
        if (first := next(read, None)) is None:
            raise TuningError("the sensitivity needs at least one batch of training images, and got none")
        total = accumulate(model, chain([first], read), objective, named, of=torch.square, limit=most)
    reduce_over_processes(total, named)
    if broken := [name for name, tensor in total.items() if not bool(tensor.isfinite().all())]:
        raise TuningError(f"the gradient of {broken[0]} is not finite; look for NaN in the images")
    return {name: tensor.cpu() for name, tensor in total.items()}


def plan(
    scores: Mapping[str, Tensor],
    model: nn.Module,
    anatomy: Anatomy,
    *,
    structure: Structure,
    budget: int,
    rank: int,
    exclude: tuple[str, ...] = (),
) -> SPT:
    """Where a budget of parameters goes, head aside.

    Args:
        scores: of `sensitivity`.
        model: the same model.
        anatomy: of it.
        structure: "lora" or "adapter".
        budget: parameters.
        rank: inner width of a branch.
        exclude: glob patterns of modules in which nothing is trained.

    Raises:
        ModelError: the model has no block that is known. TuningError: the budget is less than the class token alone,
            or every sensitivity is zero.
    """
    left_out = excluded(anatomy, exclude)
    names = [name for name in candidates(model, anatomy, f"spt-{structure}") if name not in left_out]
    if not names:
        raise TuningError("exclude leaves nothing that the budget could go to; exclude fewer modules")
    tokens = tuple(name for name in single_tokens(anatomy) if name not in left_out)
    spent = sum(math.prod(anatomy.shapes[name]) for name in tokens)
    if spent >= budget:
        raise TuningError(f"spt_budget={budget:,} is less than the class token's {spent:,}; raise it")
    ranking = _ranked(scores, anatomy, names, 2 * budget)
    costs = {name: _branch_cost(model, name, structure, rank) for name in names}
    tops = sorted({math.ceil(len(ranking.top) * step / STEPS) for step in range(1, STEPS + 1)})
    divisions = {tau: _divided(ranking.counts(tau), anatomy, costs) for tau in tops}
    tau = min(tops, key=lambda tau: abs(spent + divisions[tau].total - budget))
    best = divisions[tau]
    layers = tuple(name.rpartition(".")[0] for name in best.structured)
    places = {name: ranking.places(tau, name) for name in best.single}
    return SPT(structure, rank, layers, (*tokens, *best.whole), places)


@dataclass(frozen=True)
class _Ranking:
    """The most sensitive parameters, the first first.

    names: where they may lie. starts: of each name's numbers in one row of all. top: positions in that row. owner: of
    each, the number of its name.
    """

    names: list[str]
    starts: list[int]
    top: Tensor
    owner: Tensor

    def counts(self, tau: int) -> dict[str, int]:
        """How many of the first tau lie in each."""
        counted = torch.bincount(self.owner[:tau], minlength=len(self.names)).tolist()
        return dict(zip(self.names, counted, strict=True))

    def places(self, tau: int, name: str) -> Tensor:
        """Which of one tensor's are among the first tau, increasing."""
        number = self.names.index(name)
        return (self.top[:tau][self.owner[:tau] == number] - self.starts[number]).sort().values


@dataclass
class _Division:
    """Names of the weights with a branch, the vectors trained whole, the weights of single connections; parameters."""

    structured: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    total: int = 0


def _ranked(scores: Mapping[str, Tensor], anatomy: Anatomy, names: list[str], most: int) -> _Ranking:
    views = anatomy.views
    flat = [(views[n].matrix(scores[n]) if n in views else scores[n]).flatten() for n in names]
    ends = torch.tensor([len(score) for score in flat]).cumsum(0)
    values, top = torch.cat(flat).topk(min(most, int(ends[-1])))
    top = top[values > 0]
    if not len(top):
        raise TuningError("the loss is sensitive to no parameter of the blocks; do they all lie behind a detach()?")
    starts = [int(end) - len(score) for end, score in zip(ends, flat, strict=True)]
    return _Ranking(names, starts, top, torch.bucketize(top, ends, right=True))


def _divided(counts: Mapping[str, int], anatomy: Anatomy, costs: Mapping[str, int | None]) -> _Division:
    division = _Division()
    for name, count in counts.items():
        cost, size = costs[name], math.prod(anatomy.shapes[name])
        if name not in anatomy.views:
            if count * VECTOR_SHARE >= size:
                division.whole.append(name)
                division.total += size
        elif cost is not None and count * MATRIX_SHARE >= cost:
            division.structured.append(name)
            division.total += cost
        elif count:
            division.single.append(name)
            division.total += count
    return division


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


class Settings(Rank, Excluding):
    """Of SPT."""

    spt_budget: int = Field(400_000, gt=0, description="spt-adapter, spt-lora: trained parameters, head aside")


def _method(structure: Structure) -> Method:
    name = f"spt-{structure}"

    def prepare(run: Run, scores: Scores | None) -> SPT:
        settings, model = run.settings(Settings), run.model.to(run.device)
        anatomy, rank = describe(model, run.head), settings.rank or RANK
        scored = sensitivity(model, run.training_batches(), anatomy, run.loss)
        budget, exclude = settings.spt_budget, settings.exclude
        where = plan(scored, model, anatomy, structure=structure, budget=budget, rank=rank, exclude=exclude)
        single = sum(map(len, where.places.values()))
        log.info("%d layers have a branch, %s connections are trained themselves", len(where.structured), f"{single:,}")
        return where

    def attached(run: Run, prepared: Prepared | None) -> Inserted:
        assert isinstance(prepared, SPT)
        return prepared.attach(run.model, run.head, seed=run.seed)

    return Method(
        name, attached, Settings, prepare=prepare, load=SPT.load, read=lambda s, a: SPT.from_settings(name, s, a)
    )


SPT_ADAPTER = _method("adapter")
SPT_LORA = _method("lora")
