"""fewtune: fine-tune pretrained vision models by changing only a few of their weights."""

from fewtune.importance import (
    CrossEntropy,
    Scores,
    SupCon,
    gradient_importance,
    magnitude_importance,
    random_importance,
)
from fewtune.selection import Overlap, Selection, select

__all__ = [
    "CrossEntropy",
    "Overlap",
    "Scores",
    "Selection",
    "SupCon",
    "gradient_importance",
    "magnitude_importance",
    "random_importance",
    "select",
]
