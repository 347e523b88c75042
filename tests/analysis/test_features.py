"""Features before and after tuning: known answers on groups that are apart, and on a model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from fewtune.analysis import image_features, in_the_plane, neighbours_alike
from fewtune.errors import DataError


def _groups(apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Three groups of 30 images in 16 dimensions, their centres orthogonal."""
    labels = torch.arange(3).repeat_interleave(30)
    noise = torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    return apart * torch.eye(16)[labels] + noise, labels


def test_groups_that_are_apart_stay_apart_in_the_plane() -> None:
    features, labels = _groups(20.0)
    assert neighbours_alike(features, labels) == 1.0
    layout = in_the_plane(features, perplexity=10)
    assert layout.shape == (90, 2)
    assert neighbours_alike(torch.from_numpy(layout - layout.mean(axis=0)), labels) > 0.9
    assert np.array_equal(layout, in_the_plane(features, perplexity=10))


def test_without_groups_neighbours_are_alike_by_chance() -> None:
    features, labels = _groups(0.0)
    assert neighbours_alike(features, labels) == pytest.approx(1 / 3, abs=0.2)


def test_features_are_those_before_the_head() -> None:
    model = timm.create_model("test_vit", num_classes=4)
    images = torch.randn(6, 3, 160, 160)
    batches = [(images[:4], torch.tensor([0, 1, 2, 3]), None), (images[4:], torch.tensor([0, 1]), None)]
    features, labels = image_features(model, batches)
    assert features.shape == (6, model.num_features)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    with torch.inference_mode():
        assert torch.allclose(model.get_classifier()(features), model.eval()(images), atol=1e-5)


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="needs more images than that, got 5"):
        in_the_plane(torch.randn(5, 3))
    with pytest.raises(DataError, match="no images"):
        image_features(timm.create_model("test_vit"), [])
