"""Measures of masks: equal to established libraries', and they fall where a mask is wrong, on the background too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from fewtune.errors import DataError
from fewtune.segmentation.metrics import NAMES, MaskMeasures, mask_report, measure

EDGES = ("random", "empty", "full", "one pixel", "all but one", "a corner", "binary", "constant", "8 bits")


def pair(kind: str, seed: int, height: int = 23, width: int = 31) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and truth."""
    rng = np.random.default_rng(seed)
    p, truth = rng.random((height, width)), rng.random((height, width)) < rng.uniform(0.1, 0.9)
    if kind in ("empty", "one pixel", "a corner"):
        truth[:] = False
    if kind in ("full", "all but one"):
        truth[:] = True
    if kind in ("one pixel", "all but one"):
        truth[rng.integers(1, height - 1), rng.integers(1, width - 1)] ^= True
    if kind == "a corner":
        truth[:3, :2] = True
    if kind == "binary":
        p = (p > 0.7).astype(float)
    if kind == "constant":
        p[:] = seed % 2
    if kind == "8 bits":
        p = np.round(255 * p) / 255
    return p, truth


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_py_sod_metrics(kind: str, seed: int) -> None:
    library = pytest.importorskip("py_sod_metrics", reason="pip install pysodmetrics")
    p, truth = pair(kind, seed)
    ours = measure(p, truth)
    binary = library.FmeasureV2(
        metric_handlers={
            "dice": library.DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
            "iou": library.IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
        }
    )
    others = {
        "mae": (library.MAE(), "maes"), "s_measure": (library.Smeasure(), "sms"),
        "e_measure": (library.Emeasure(), "changeable_ems"), "weighted_f": (library.WeightedFmeasure(), "weighted_fms"),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (metric, kept) in others.items():
            metric.step(p, truth, normalize=False)
            assert getattr(ours, name) == pytest.approx(float(np.mean(getattr(metric, kept))), abs=1e-6), name
        mask = (p >= 0.5).astype(np.float64)
        binary.step(mask, truth, normalize=False)
    if truth.any() or mask.any():  # of nothing in nothing the library makes 0
        for name in ("dice", "iou"):
            theirs = float(np.mean(binary.get_results()[name]["binary"]))
            assert getattr(ours, name) == pytest.approx(theirs, abs=1e-6), name


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("seed", range(4))
def test_dice_and_iou_are_scikit_learns(kind: str, seed: int) -> None:
    p, truth = pair(kind, seed)
    got, mask, flat = measure(p, truth), (p >= 0.5).ravel(), truth.ravel()
    assert got.dice == pytest.approx(f1_score(flat, mask, zero_division=1.0), abs=1e-9)
    assert got.iou == pytest.approx(jaccard_score(flat, mask, zero_division=1.0), abs=1e-9)


def test_nothing_in_nothing_is_right() -> None:
    nothing = np.zeros((9, 9), dtype=bool)
    assert measure(nothing.astype(float), nothing).dice == measure(nothing.astype(float), nothing).iou == 1
    assert measure(np.ones((9, 9)), nothing).dice == measure(np.ones((9, 9)), nothing).iou == 0


@pytest.mark.parametrize("share", [0.05, 0.15, 0.4])
def test_planted_errors_cost(share: float) -> None:
    """Paint everything, paint nothing, a shifted mask, a mask with a false region far off. A measure that looks at the
    object's pixels alone gives the first and the last the full score and fails here."""
    side = 60
    truth = np.zeros((side, side), dtype=bool)
    width = round(side * share**0.5)
    truth[4 : 4 + width, 6 : 6 + width] = True
    right = measure(truth.astype(float), truth)
    assert (right.dice, right.iou, right.mae) == (1, 1, 0)
    assert min(right.s_measure, right.e_measure, right.weighted_f) > 0.99
    far = truth.copy()
    far[-8:, -8:] = True
    planted = {
        "everything": np.ones_like(truth),
        "nothing": np.zeros_like(truth),
        "shifted": np.roll(truth, (width // 3, width // 3), axis=(0, 1)),
        "a false region": far,
    }
    for name, mask in planted.items():
        wrong = measure(mask.astype(float), truth)
        assert wrong.mae > 0.01, name
        for measured in ("dice", "iou", "s_measure", "e_measure", "weighted_f"):
            drop = getattr(right, measured) - getattr(wrong, measured)
            assert drop > 0.005, (name, measured)
        if name != "a false region":
            assert wrong.iou < 0.75
            assert wrong.weighted_f < 0.75
    everything = measure(planted["everything"].astype(float), truth)
    assert everything.iou == pytest.approx(truth.mean())  # what is painted beside the object costs all that it covers


def test_more_false_positives_cost_more() -> None:
    truth = np.zeros((40, 40), dtype=bool)
    truth[15:25, 15:25] = True
    values = []
    for rows in (0, 4, 8, 12):
        mask = truth.copy()
        mask[:rows] = True
        values.append(measure(mask.astype(float), truth))
    for name in NAMES:
        series = [getattr(value, name) * (-1 if name == "mae" else 1) for value in values]
        assert series == sorted(series, reverse=True), name
        assert series[0] > series[-1], name


def test_means_are_over_images_and_not_over_pixels() -> None:
    small, large = np.ones((4, 4), dtype=bool), np.ones((400, 400), dtype=bool)
    got = mask_report([measure(np.ones((4, 4)), small), measure(np.zeros((400, 400)), large)])
    assert got.images == 2
    assert got.dice.value == 0.5
    assert got.dice.low == 0
    assert got.dice.high == 1
    assert set(got.to_json()) == {"images", *NAMES}


@pytest.mark.parametrize(
    ("p", "truth"),
    [
        (np.zeros((3, 4)), np.zeros((4, 3), dtype=bool)),
        (np.zeros((3, 3)), np.zeros((3, 3), dtype=np.uint8)),
        (np.full((3, 3), 1.5), np.zeros((3, 3), dtype=bool)),
        (np.full((3, 3), np.nan), np.zeros((3, 3), dtype=bool)),
        (np.zeros((0, 3)), np.zeros((0, 3), dtype=bool)),
    ],
)
def test_what_is_no_map_is_refused(p: np.ndarray, truth: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expected|must lie"):
        measure(p, truth)
    with pytest.raises(DataError):
        mask_report([])


def test_measures_of_a_line_of_pixels_are_numbers() -> None:
    """A picture of one row: py-sod-metrics gives NaN."""
    truth = np.zeros((1, 10), dtype=bool)
    truth[0, 3:6] = True
    got = measure(np.linspace(0, 1, 10)[None], truth)
    assert isinstance(got, MaskMeasures)
    assert all(np.isfinite(getattr(got, name)) for name in NAMES)
