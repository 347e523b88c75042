"""The supervised contrastive loss against a plain double loop (Eq. 2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewtune
from fewtune.errors import ImportanceError
from fewtune.losses import supervised_contrastive_loss


def slow_loss(features: list[list[float]], labels: list[int], temperature: float, base: float) -> float:
    """Eq. 2, term by term."""
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features]

    def similarity(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) / temperature

    samples, terms = range(len(labels)), []
    for i in samples:
        positives = [p for p in samples if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        total = math.log(sum(math.exp(similarity(i, a)) for a in samples if a != i))
        mean = sum(similarity(i, p) - total for p in positives) / len(positives)
        terms.append(-temperature / base * mean)
    return sum(terms) / len(terms) if terms else 0.0


batches = st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.integers(1, 4), st.integers(0, 999))


@given(batches, st.floats(0.07, 2.0), st.floats(0.07, 2.0))
@settings(max_examples=60, deadline=None)
def test_one_view(batch: tuple[list[int], int, int], temperature: float, base: float) -> None:
    labels, width, seed = batch
    features = torch.randn(len(labels), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = supervised_contrastive_loss(features, torch.tensor(labels), temperature, base)
    assert float(loss) == pytest.approx(slow_loss(features.tolist(), labels, temperature, base), rel=1e-9, abs=1e-9)


@given(batches)
@settings(max_examples=30, deadline=None)
def test_two_views_are_samples_of_one_label(batch: tuple[list[int], int, int]) -> None:
    labels, width, seed = batch
    generator = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(len(labels), width, dtype=torch.float64, generator=generator) for _ in range(2))
    objective = fewtune.SupCon(features=lambda model, images: images)
    loss = objective(torch.nn.Identity(), views, torch.tensor(labels))
    expected = slow_loss([*views[0].tolist(), *views[1].tolist()], labels + labels, 0.07, 0.07)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_anchors_without_positives_are_left_out() -> None:
    features = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = [0, 0, 1, 2, 3]
    loss = supervised_contrastive_loss(features, torch.tensor(labels))
    assert float(loss) == pytest.approx(slow_loss(features.tolist(), labels, 0.07, 0.07))
    per_sample = float(loss) * 2 / 5  # what a mean over all five samples would give
    assert float(loss) != pytest.approx(per_sample)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0]])
def test_a_batch_without_positives_gives_zero_and_no_nan(labels: list[int]) -> None:
    features = torch.randn(len(labels), 4, requires_grad=True)
    loss = supervised_contrastive_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_gradients_by_differences() -> None:
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive_loss(x, labels, 0.3), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_float32(dtype: torch.dtype) -> None:
    features = (100 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(8) % 3
    loss = supervised_contrastive_loss(features, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(supervised_contrastive_loss(features.double(), labels)), rel=1e-4)


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(4, 2, 2), torch.zeros(4)),
        (torch.zeros(4, 2), torch.zeros(3)),
        (torch.zeros(4, 2), torch.zeros(4, 1, 1)),
    ],
)
def test_shapes_that_do_not_fit(features: Tensor, labels: Tensor) -> None:
    with pytest.raises(ImportanceError, match=r"expected \[samples, width\], and \[samples\] or"):
        supervised_contrastive_loss(features, labels)
