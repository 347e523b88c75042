"""Measures against hand-made figures and slow formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewtune.classification.metrics import report
from fewtune.errors import DataError
from fewtune.metrics import bootstrap, paired_bootstrap, wilson


def test_report_of_a_small_hand_made_case() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2])
    got = report(torch.eye(4)[predicted], labels, ("a", "b", "c", "absent"))
    assert got.accuracy.value == 6 / 8
    assert got.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # the absent class does not count
    assert got.recall == pytest.approx((3 / 4, 1 / 2, 1, 0))
    assert got.precision == pytest.approx((3 / 4, 1 / 2, 1, 0))
    assert got.support == (4, 2, 2, 0)
    assert got.confusion == ((3, 1, 0, 0), (1, 1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0))
    assert got.calibration_error == pytest.approx(2 / 8)  # always sure, wrong in a quarter of the cases


def test_calibration_error_is_the_binned_formula() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.randn(500, 5).mul(2).softmax(1), torch.randint(0, 5, (500,))
    confidence, predicted = probabilities.max(1)
    slow = 0.0
    for low in np.linspace(0, 1, 16)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = (predicted[inside] == labels[inside]).float().mean() - confidence[inside].mean()
            slow += float(inside.float().mean() * gap.abs())
    got = report(probabilities, labels, tuple("abcde"))
    assert got.calibration_error == pytest.approx(slow, abs=1e-5)


def test_bootstrap_of_hits_matches_slow_resampling() -> None:
    rng = np.random.default_rng(1)
    hits = (rng.random(200) < 0.8).astype(float)
    slow = np.array([rng.choice(hits, 200).mean() for _ in range(4000)])
    got = bootstrap(hits, samples=4000)
    assert got.value == hits.mean()
    assert got.low == pytest.approx(np.quantile(slow, 0.025), abs=0.01)
    assert got.high == pytest.approx(np.quantile(slow, 0.975), abs=0.01)
    assert bootstrap(hits) == bootstrap(hits)


def test_paired_bootstrap_is_narrower_than_unpaired_and_has_the_right_sign() -> None:
    rng = np.random.default_rng(2)
    worse = (rng.random(1000) < 0.7).astype(float)
    better = np.maximum(worse, (rng.random(1000) < 0.1).astype(float))
    got = paired_bootstrap(worse, better)
    assert got.value == pytest.approx(better.mean() - worse.mean())
    assert 0 < got.low < got.value < got.high
    unpaired = 2 * 1.96 * np.sqrt(worse.var() / 1000 + better.var() / 1000)
    assert got.high - got.low < unpaired / 2
    same = paired_bootstrap(worse, worse)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    """By its formula; of n right among n it does not say that all others would be right too."""
    n, p, z = 40, 0.7, 1.959963984540054
    middle, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z * np.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z**2 / n)
    got = wilson(np.arange(n) < n * p)
    assert (got.value, got.low, got.high) == pytest.approx((p, middle - half, middle + half))
    labels = torch.arange(20) % 2
    sure = report(torch.eye(2)[labels], labels, ("a", "b")).accuracy
    assert (sure.value, sure.high) == (1, 1)
    assert sure.low == pytest.approx(1 / (1 + z**2 / 20))
    with pytest.raises(DataError, match="no predictions"):
        wilson(np.array([]))


def test_what_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="no predictions"):
        bootstrap(np.array([]))
    with pytest.raises(DataError, match="same images, got 3 and 2"):
        paired_bootstrap(np.ones(3), np.ones(2))
    with pytest.raises(DataError, match=r"expected probabilities of shape \(2, 3\), got \(2, 2\)"):
        report(torch.ones(2, 2), torch.tensor([0, 1]), tuple("abc"))
