"""Scores of models whose weights two processes share out (FSDP2): those of one process that sees all batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import ViTConfig, ViTForImageClassification

import distributed
from attaching import batch, small_convnet, small_vit
from fewtune.errors import ImportanceError
from fewtune.importance import (
    correlation_importance,
    gradient_importance,
    magnitude_importance,
    snr_importance,
)
from fewtune.neurons import describe
from fewtune.objectives import CrossEntropy
from fewtune.selection import select

TOLERANCE = 1e-10
"""Of the largest score of a layer, in float64: two processes add in another order than one."""
BATCHES = 4


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=4, intermediate_size=24, num_labels=4, **sizes)
    return ViTForImageClassification(config).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: small_vit().double(),
    "convnet": lambda: small_convnet().double(),
    "vit of transformers": hf_vit,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "views": {},
    "passes, stored": {"passes": 3, "store": "cpu"},
    "training mode": {"train_mode": True},
    "head": {"objective": CrossEntropy()},
    "settled": {"settle": 0.01},
}


def sharded(model: nn.Module) -> nn.Module:
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    return fully_shard(model)


def batches(rank: int | None) -> list[Any]:
    """A process's batches of two views; of one process alone, those of both in the order of the steps."""
    both = [(pair(2 * n), pair(2 * n + 1)) for n in range(BATCHES)]
    return [one for step in both for one in step] if rank is None else [step[rank] for step in both]


def pair(number: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    images, labels = batch(number, size=6, dtype=torch.float64)
    return (images, images.flip(-1)), labels


class Scored:
    """A model scored alone (rank None), or as one of two processes."""

    def __init__(self, kind: str, options: str) -> None:
        self.kind, self.options = kind, options

    def __call__(self) -> dict[str, Any]:
        return self.scored(dist.get_rank())

    def scored(self, rank: int | None) -> dict[str, Any]:
        model, options = MODELS[self.kind](), dict(OPTIONS[self.options])
        if rank is None:
            options.pop("settle", None)  # of it the number of batches is known: all of two are looked at
            options |= {"limit": 4} if self.options == "settled" else {}
        else:
            sharded(model)
        before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        scores = gradient_importance(model, batches(rank), **options)
        assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
        assert "forward" not in vars(model)
        return {"scores": dict(scores), "places": select(scores, k=1).places, "anatomy": scores.anatomy}


class Others:
    """What the other criteria say of a sharded model."""

    def __call__(self) -> dict[str, Any]:
        model, refused = sharded(MODELS["vit"]()), {}
        for criterion in (correlation_importance, snr_importance):
            with pytest.raises(ImportanceError) as error:
                criterion(model, batches(dist.get_rank()))
            refused[criterion.__name__] = str(error.value)
        return {"refused": refused, "magnitude": dict(magnitude_importance(model))}


CASES = {f"{kind}, {options}": Scored(kind, options) for kind in MODELS for options in OPTIONS}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> distributed.Results:
    return distributed.run(CASES | {"others": Others()}, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_the_weights_score_what_one_process_scores(
    case: str, results: distributed.Results
) -> None:
    alone, (first, second) = CASES[case].scored(None), results.of(case)
    assert first["anatomy"] == second["anatomy"] == alone["anatomy"]
    for name, score in alone["scores"].items():
        assert torch.equal(first["scores"][name], second["scores"][name])
        assert torch.allclose(first["scores"][name], score, rtol=0, atol=TOLERANCE * float(score.max())), name
        assert torch.equal(first["places"][name].flat, alone["places"][name].flat), name


def test_magnitudes_are_those_of_the_whole_weights(results: distributed.Results) -> None:
    expected = magnitude_importance(MODELS["vit"]())
    for got in results.of("others"):
        assert got["magnitude"].keys() == expected.keys() == describe(MODELS["vit"]()).views.keys()
        assert all(torch.equal(got["magnitude"][name], score) for name, score in expected.items())


def test_other_criteria_refuse_a_sharded_model_in_one_line(results: distributed.Results) -> None:
    for criterion, said in results.of("others")[0]["refused"].items():
        assert said.startswith(f"{criterion} needs whole weights")
        assert "score first, then shard" in said
        assert "\n" not in said
