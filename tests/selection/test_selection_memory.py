"""What `select` allocates beside the scores: counted tensor by tensor, since no clock tells it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewtune

LAYERS, WIDTH = 24, 128


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operation gives out while it is active."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.size = max([self.size, *sizes])
        return result


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_no_temporary_is_as_large_as_the_network(granularity: str) -> None:
    """Of one matrix its positions as int64 may be made, and a histogram; nothing that holds all scores at once."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    scores = fewtune.random_importance(model, head=None)
    with Largest() as largest:
        selection = fewtune.select(scores, budget=0.1, granularity=granularity)
    assert abs(selection.connections - 0.1 * LAYERS * WIDTH**2) < LAYERS  # rounded once a layer
    one = WIDTH**2 * 8
    assert largest.size <= max(one, 8 * 2**16), "more than one matrix of int64, or the histogram of 16 bits"
    assert largest.size < LAYERS * WIDTH**2 * 4
