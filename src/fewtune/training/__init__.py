"""`fit`, `evaluate`, `predict`: from labelled images to a task file, and from a task file to predictions.

Each is imported when it is first asked for, since training needs Lightning and predicting does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewtune.training.evaluation import evaluate
    from fewtune.training.prediction import predict
    from fewtune.training.protocol import Result, fit

__all__ = ["Result", "evaluate", "fit", "predict"]

_HOMES = {"fit": "protocol", "Result": "protocol", "evaluate": "evaluation", "predict": "prediction"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
