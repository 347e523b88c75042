"""The exponential moving average of what is trained; frozen weights take no part, so they cannot drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn


class Trained(Protocol):
    """What is averaged: parameters, and a call to make once they were changed by hand."""

    def parameters(self) -> Sequence[nn.Parameter]: ...

    def sync(self) -> None: ...


class AverageState(TypedDict):
    """What a checkpoint keeps of an average."""

    steps: int
    values: list[Tensor]


class Average:
    """average <- decay * average + (1 - decay) * value, after every optimiser step.

    As in timm's and TensorFlow's, the decay of the first steps is smaller, (1 + t) / (10 + t), so that a short
    run's average is not its initial values.
    """

    def __init__(self, trained: Trained, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = [parameter.detach().clone() for parameter in trained.parameters()]

    @torch.no_grad()
    def update(self, trained: Trained) -> None:
        """Take one more step's values into the average (in place, by lerp)."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parameters = trained.parameters()
        # The model may have been moved to its device after the average was made.
        self.values = [value.to(parameter.device) for value, parameter in zip(self.values, parameters, strict=True)]
        for average, parameter in zip(self.values, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def in_place_of(self, trained: Trained) -> Iterator[None]:
        """Within the block, the average stands where the trained values stood."""
        before = [parameter.detach().clone() for parameter in trained.parameters()]
        _write(trained, self.values)
        try:
            yield
        finally:
            _write(trained, before)

    def state_dict(self) -> AverageState:
        """The averaged values and the count of steps."""
        return {"steps": self.steps, "values": [value.clone() for value in self.values]}

    def load_state_dict(self, state: AverageState) -> None:
        """Go on from a saved average."""
        self.steps = state["steps"]
        for held, value in zip(self.values, state["values"], strict=True):
            held.copy_(value)


@torch.no_grad()
def _write(trained: Trained, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(trained.parameters(), values, strict=True):
        parameter.copy_(value)
    trained.sync()
