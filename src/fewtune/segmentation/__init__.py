"""Binary segmentation: models that draw one mask, their data, their measures, and `fit`, `evaluate`, `predict`.

The latter are imported when they are first asked for, since training needs Lightning and predicting does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewtune.segmentation.evaluation import evaluate
    from fewtune.segmentation.prediction import predict
    from fewtune.segmentation.protocol import fit

__all__ = ["evaluate", "fit", "predict"]

_HOMES = {"fit": "protocol", "evaluate": "evaluation", "predict": "prediction"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
