"""The pooled features that the contrastive loss is given, from a model's own interface."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.objectives import pooled_features


class Plain(nn.Module):
    """No interface of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(x)))


def test_features_are_what_the_head_is_given() -> None:
    model, x = Plain(), torch.randn(5, 4)
    assert torch.equal(pooled_features(model, x, "last"), torch.tanh(model.body(x)))
    assert torch.equal(pooled_features(model, x, None), model(x))
    model.last.forward = lambda input: nn.functional.linear(input, model.last.weight)  # type: ignore[method-assign]
    model.forward = lambda x: model.last(input=torch.tanh(model.body(x)))  # type: ignore[method-assign]
    assert torch.equal(pooled_features(model, x, "last"), torch.tanh(model.body(x))), "a head called by keyword"
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Flatten())
    features = pooled_features(convolutional, torch.randn(2, 3, 5, 5), "2")
    assert features.shape == (2, 4)


def test_features_of_transformers() -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    configuration = ViTConfig(image_size=8, patch_size=4, **sizes)
    x = torch.randn(2, 3, 8, 8)
    classifier = ViTForImageClassification(configuration).eval()
    assert torch.allclose(pooled_features(classifier, x), classifier.vit(x).last_hidden_state[:, 0])
    base = ViTModel(configuration).eval()
    assert torch.equal(pooled_features(base, x), base(x).pooler_output)


def test_features_that_are_none() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ImportanceError, match=r"Conv2d gave pooled features \(2, 4, 3, 3\); expected \[batch, width\]"):
        pooled_features(model, torch.zeros(2, 3, 5, 5), None)
