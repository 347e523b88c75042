"""Measures of images of any number of classes: scikit-learn's, on made-up predictions with ties and empty classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

import fewtune
from fewtune.errors import DataError
from fewtune.losses import supervised_contrastive_loss
from fewtune.multilabel.metrics import best_thresholds, mean_average_precision, paired_map, report, resampled_map

NAMES = ("a", "b", "c", "d")


def made_up(images: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, 4] with many ties, and labels that no image has of the last class."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 4)) < (0.5, 0.2, 0.8, 0)).astype(np.int64)
    scores = np.round(np.clip(0.35 * labels + rng.random((images, 4)) * 0.6, 0, 1), 1)
    return torch.tensor(scores, dtype=torch.float32), torch.from_numpy(labels)


def test_measures_equal_scikit_learns() -> None:
    scores, labels = made_up()
    thresholds = (0.5, 0.4, 0.6, 0.5)
    got = report(scores, labels, NAMES, thresholds)
    y, p = labels.numpy(), scores.numpy()
    hits = p >= np.float32(thresholds)
    assert got.map.value == pytest.approx(average_precision_score(y[:, :3], p[:, :3], average="macro"), abs=1e-6)
    assert got.average_precision[3] is None
    each = {"average": None, "zero_division": 0}
    assert got.f1_by_class == pytest.approx(f1_score(y, hits, **each))
    assert got.precision == pytest.approx(precision_score(y, hits, **each))
    assert got.recall == pytest.approx(recall_score(y, hits, **each))
    assert got.f1.value == pytest.approx(f1_score(y[:, :3], hits[:, :3], average="macro"))
    assert got.f1_micro == pytest.approx(f1_score(y, hits, average="micro"))
    assert got.f1_images.value == pytest.approx(f1_score(y, hits, average="samples", zero_division=1))
    assert got.support == tuple(y.sum(0))
    for interval in (got.map, got.f1, got.f1_images):
        assert interval.low < interval.value < interval.high


def test_an_interval_is_of_images_drawn_again() -> None:
    scores, labels = made_up(25)
    p, y = scores.numpy()[:, :3], labels.numpy()[:, :3]
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, len(p), (20, len(p)))
    counts = np.stack([np.bincount(rows, minlength=len(p)) for rows in drawn])
    expected = [average_precision_score(y[rows], p[rows], average="macro") for rows in drawn]
    assert resampled_map(p, y, counts) == pytest.approx(expected)


def test_the_difference_of_two_sets_is_of_the_same_draws() -> None:
    scores, labels = made_up(200)
    p, y = scores.numpy(), labels.numpy()
    one, two, gap = paired_map(p, np.clip(p + 0.1 * y, 0, 1), y)
    assert one == pytest.approx(mean_average_precision(scores, labels))
    assert gap.value == pytest.approx(two - one)
    assert 0 < gap.low < gap.value < gap.high
    assert paired_map(p, p, y)[2].high == 0


def test_thresholds_are_those_of_the_largest_f1() -> None:
    scores, labels = made_up(80, seed=1)
    thresholds = best_thresholds(scores, labels)
    for c in range(3):
        p, y = scores[:, c].numpy(), labels[:, c].numpy()
        best = max(f1_score(y, p >= step) for step in np.unique(p))
        assert f1_score(y, p >= thresholds[c]) == pytest.approx(best)
        assert thresholds[c] not in p  # half-way between two probabilities
    assert thresholds[3] == 0.5  # no image has the class


def test_no_image_or_another_shape_is_refused() -> None:
    scores, labels = made_up()
    with pytest.raises(DataError, match=r"\(images, 4\)"):
        report(scores[:, :3], labels[:, :3], NAMES, (0.5,) * 4)
    with pytest.raises(DataError, match="shape"):
        report(scores[:0], labels[:0], NAMES, (0.5,) * 4)


def test_contrast_by_overlap_is_the_paper_s_where_each_image_has_one_class() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 4
    one_hot = torch.nn.functional.one_hot(labels, 4)
    assert torch.equal(supervised_contrastive_loss(features, one_hot), supervised_contrastive_loss(features, labels))


def test_contrast_by_overlap_is_its_formula() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]])
    z = torch.nn.functional.normalize(features, dim=1)
    terms = []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        total = sum(torch.exp(z[i] @ z[a] / 0.07) for a in others)
        overlap = {p: int((labels[i] & labels[p]).sum()) / max(1, int((labels[i] | labels[p]).sum())) for p in others}
        if any(overlap.values()):
            logs = sum(w * torch.log(torch.exp(z[i] @ z[p] / 0.07) / total) for p, w in overlap.items())
            terms.append(-logs / sum(overlap.values()))
    assert len(terms) == 5  # an image without a class has no term
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(supervised_contrastive_loss(features, labels), expected, rtol=1e-6, atol=0)
    objective = fewtune.SupCon(features=lambda model, images: images)
    two_views = objective(torch.nn.Identity(), (features, features), labels)
    torch.testing.assert_close(
        two_views, supervised_contrastive_loss(features.repeat(2, 1), labels.repeat(2, 1)), rtol=1e-6, atol=0
    )
