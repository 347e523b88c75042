"""fewtune: fine-tune pretrained vision models by changing only a few of their weights."""

from importlib.metadata import version
from typing import Any

from fewtune.delta import Delta, load_delta
from fewtune.errors import FewtuneError
from fewtune.importance import (
    Scores,
    correlation_importance,
    difference_importance,
    gradient_importance,
    magnitude_importance,
    random_importance,
    snr_importance,
    wanda_importance,
)
from fewtune.neurons import Role
from fewtune.objectives import CrossEntropy, SupCon
from fewtune.selection import Overlap, Selection, select
from fewtune.tuning import Tuner, attach, matrix_library

__version__ = version("fewtune")

__all__ = [
    "CrossEntropy",
    "Delta",
    "FewtuneError",
    "Overlap",
    "Role",
    "Scores",
    "Selection",
    "SupCon",
    "Tuner",
    "__version__",
    "attach",
    "correlation_importance",
    "difference_importance",
    "gradient_importance",
    "load_delta",
    "magnitude_importance",
    "matrix_library",
    "random_importance",
    "select",
    "snr_importance",
    "wanda_importance",
]

WITH_TRAINING = ("Predictor", "load_task")
"""Names of `fewtune.tasks` that are offered here too; they need the libraries of the extra "train"."""


def __getattr__(name: str) -> Any:
    if name not in WITH_TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fewtune import tasks
    except ModuleNotFoundError as error:
        from fewtune.errors import MissingExtra

        raise MissingExtra(error.name or "pydantic", "train") from None
    return getattr(tasks, name)
