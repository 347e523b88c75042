"""How alike two scores order a model's connections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from fewtune.errors import ImportanceError
from fewtune.importance import Scores
from fewtune.neurons import View


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlations of two scores, each in -1..1; NaN where one of the scores does not vary.

    ``network``: over all connections. ``layers``: over the connections of each weight, by weight name.
    ``neurons``: by weight name, the mean over its neurons of the correlation over the neuron's own connections (neurons
    without variation left out). A selection by neuron depends on the last alone: what differs between neurons or
    layers, such as the scale of their gradients, does not change it.
    """

    network: float
    layers: Mapping[str, float]
    neurons: Mapping[str, float]


def rank_correlation(first: Scores, second: Scores) -> RankCorrelation:
    """Spearman's correlation of two scores of the same model: Pearson's of the ranks, equal scores sharing theirs.

    Raises:
        ImportanceError: the scores are of different models, or of different weights.
    """
    if first.anatomy.views != second.anatomy.views or first.keys() != second.keys():
        raise ImportanceError("the two scores belong to different models: their weights differ")
    matrices = {
        name: tuple(_matrix(view, scores[name]) for scores in (first, second))
        for name, view in first.anatomy.views.items()
        if name in first
    }
    layers = {name: _rows(a.reshape(1, -1), b.reshape(1, -1)) for name, (a, b) in matrices.items()}
    neurons = {name: _rows(a, b) for name, (a, b) in matrices.items()}
    together = (np.concatenate([pair[i].reshape(-1) for pair in matrices.values()])[None] for i in (0, 1))
    return RankCorrelation(_rows(*together), layers, neurons)


def _matrix(view: View, score: Tensor) -> np.ndarray:
    """A score as [neurons, fan_in], in float32 at least: NumPy has no bfloat16."""
    return view.matrix(score).cpu().to(torch.promote_types(score.dtype, torch.float32)).numpy()


def _rows(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of the rank correlation of two matrices [rows, columns]; NaN where no row varies in both."""
    ranks = [rankdata(x, axis=1) for x in (a, b)]
    x, y = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    varied = size > 0
    if not varied.any():
        return float("nan")
    return float(((x * y).sum(axis=1)[varied] / size[varied]).mean())
