"""fewtune: fine-tune pretrained vision models by changing only a few of their weights."""

from importlib.metadata import version

from fewtune.delta import Delta, load_delta
from fewtune.errors import FewtuneError
from fewtune.importance import (
    Scores,
    difference_importance,
    gradient_importance,
    magnitude_importance,
    random_importance,
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
    "difference_importance",
    "gradient_importance",
    "load_delta",
    "magnitude_importance",
    "matrix_library",
    "random_importance",
    "select",
]
