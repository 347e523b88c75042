"""What the tests of scores share: a small model, its batches, and sums of dense gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.importance import Scores

Batch = tuple[Any, Tensor]


class Net(nn.Module):
    """A convolution, batch normalisation, dropout and a linear layer; says what its head is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        return self.drop(F.gelu(self.norm(self.conv(x))).mean((2, 3)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.linear(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def images(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Batch]:
    return [(images(seed, dtype), LABELS) for seed in range(count)]


WEIGHTS = ("conv.weight", "linear.weight")


def dense_sums(
    model: nn.Module, data: list[Batch], loss: Callable[[nn.Module, Any, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Batch by batch, by autograd, with the sign; then the modulus."""
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in WEIGHTS}
    for inputs, labels in data:
        grads = torch.autograd.grad(loss(model, inputs, labels), [model.get_parameter(name) for name in WEIGHTS])
        for name, grad in zip(WEIGHTS, grads, strict=True):
            sums[name] += grad
    return {name: total.abs() for name, total in sums.items()}


def cross_entropy(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def assert_close(scores: Scores, expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(scores) == list(expected)
    for name, value in expected.items():
        assert scores[name].shape == value.shape
        assert float((scores[name] - value).abs().max() / value.max()) < tolerance
