"""The size of a task on ViT-B/16, with all that is in the file counted. Sizes do not depend on the machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from delta_cases import Task, made_up
from fewtune.delta.delta import from_bytes
from fewtune.delta.format import pack_numbers, to_bytes
from fewtune.importance import Scores, random_importance
from fewtune.selection import select

timm = pytest.importorskip("timm")

CONNECTIONS = 83_712
HOT = {"qkv": 35 / 384, "proj": 33 / 384, "fc1": 48 / 384, "fc2": 39 / 1536}
"""Share of the columns that a K = 1 selection by gradients touches, measured on a pretrained ViT-S."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def task(model: nn.Module, k: int, hot: bool) -> Task:
    """A random selection; with ``hot`` only among as many columns as a real selection touches."""
    scores = random_importance(model, seed=0)
    if hot:
        scores = Scores({n: _only_hot(n, scores) for n in scores}, scores.anatomy)
    return made_up(model, select(scores, k=k))


def _only_hot(name: str, scores: Scores) -> Tensor:
    view = scores.anatomy.views[name]
    share = next((s for layer, s in HOT.items() if f".{layer}." in name), 0.1)
    cold = torch.randperm(view.fan_in)[round(share * view.fan_in) :]
    matrix = view.matrix(scores[name].clone())
    matrix[:, cold] = 0.0
    return view.stored(matrix)


def per_connection(task: Task, dtype: torch.dtype | None = None) -> float:
    """Bytes a connection of all of the file but the numbers of biases and head, which are packed on their own here."""
    dense = torch.cat([t.reshape(-1) for t in task.delta.whole.values()]).to(dtype or torch.float32)
    return (len(to_bytes(task.delta, dtype)) - len(pack_numbers(dense))) / task.delta.selection().connections


@pytest.fixture(scope="module")
def random_task(model: nn.Module) -> Task:
    return task(model, 1, hot=False)


@pytest.fixture(scope="module")
def hot_task(model: nn.Module) -> Task:
    return task(model, 1, hot=True)


def test_a_connection_takes_few_bytes(random_task: Task, hot_task: Task) -> None:
    """At most 6 bytes lossless and 3 in half precision, even where connections are spread at random."""
    assert random_task.delta.selection().connections == hot_task.delta.selection().connections == CONNECTIONS
    sizes = {
        (name, str(dtype)): per_connection(t, dtype)
        for name, t in {"random": random_task, "hot": hot_task}.items()
        for dtype in (None, torch.float16, torch.bfloat16)
    }
    assert sizes["random", "None"] < 4.8
    assert sizes["hot", "None"] < 4.4
    assert all(size < 3 for (_, dtype), size in sizes.items() if dtype != "None")
    assert from_bytes(to_bytes(hot_task.delta)) == hot_task.delta


def test_a_task_is_about_a_megabyte(hot_task: Task) -> None:
    assert len(to_bytes(hot_task.delta)) < 1_000_000
    assert len(to_bytes(hot_task.delta, torch.float16)) < 550_000


@pytest.mark.slow
def test_ten_connections_a_neuron(model: nn.Module) -> None:
    assert len(to_bytes(task(model, 10, hot=False).delta)) < 5_000_000
