"""A score for every connection of a model: by gradients, inputs, magnitude, chance, or what full fine-tuning moves."""

from fewtune.importance.correlation import correlation_importance
from fewtune.importance.gradient import gradient_importance
from fewtune.importance.noise import snr_importance
from fewtune.importance.passes import accumulate, left_as_found, reduce_over_processes
from fewtune.importance.scores import Scores, scored_weights
from fewtune.importance.simple import difference_importance, magnitude_importance, random_importance
from fewtune.importance.wanda import wanda_importance

__all__ = [
    "Scores",
    "accumulate",
    "correlation_importance",
    "difference_importance",
    "gradient_importance",
    "left_as_found",
    "magnitude_importance",
    "random_importance",
    "reduce_over_processes",
    "scored_weights",
    "snr_importance",
    "wanda_importance",
]
