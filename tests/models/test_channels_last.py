"""Convolutions stored channels-last: the same numbers, and task files that do not know of it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import fewtune
from fewtune.models import channels_last

CONVOLUTIONAL = ("test_efficientnet", "test_convnext", "test_resnet")


def trained(model: nn.Module) -> fewtune.Tuner:
    """Five steps of Adam in float64 on connections chosen at random."""
    tuner = fewtune.attach(model, fewtune.select(fewtune.random_importance(model, seed=1), k=2))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-2)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuner


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3).double().eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_training_and_task_file_are_those_of_the_other_layout(name: str) -> None:
    usual, last = plain(name), channels_last(plain(name))
    assert any(weight.dim() == 4 and not weight.is_contiguous() for weight in last.parameters())
    values = [trained(model).delta().values for model in (usual, last)]
    assert values[0].keys() == values[1].keys()
    for key, value in values[0].items():
        torch.testing.assert_close(values[1][key], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_task_file_moves_between_layouts(name: str) -> None:
    last = channels_last(plain(name))
    before = weights(last)
    tuner = trained(last)
    delta = tuner.delta()
    tuner.detach(keep=True)
    tuned = weights(last)
    for model in (plain(name), channels_last(plain(name))):
        delta.apply(model)
        assert all(torch.equal(value, tuned[key]) for key, value in model.state_dict().items())
        delta.revert(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_patch_embedding_alone_is_left_as_it_is() -> None:
    model = channels_last(plain("test_vit"))
    assert all(weight.is_contiguous() for weight in model.parameters())
