"""Which choice is best on validation images, and what to try next where the best lies at an edge."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Setting = dict[str, Any]


def chosen(judged: Iterable[tuple[Setting, Sequence[Mapping[str, Any]]]]) -> tuple[Setting, list[dict[str, Any]]]:
    """The best choice with its number of epochs (or the probe's regularisation), and a row for all that was tried.

    Accuracies and losses are means over the choosing seeds; the best is the one with the highest accuracy, of equals
    the one with the lowest loss, of equals the first. A run whose loss became infinite counts as accuracy 0.

    Args:
        judged: of every choosing run its choice and its candidates on validation images, {"setting", "accuracy",
            "loss"} each.
    """
    tried: dict[str, list[Mapping[str, Any]]] = {}
    settings: dict[str, Setting] = {}
    for choice, candidates in judged:
        for candidate in candidates or [{"setting": {}, "accuracy": 0.0, "loss": math.inf}]:
            setting = {**choice, **candidate["setting"]}
            key = json.dumps(setting, default=str)
            settings[key] = setting
            tried.setdefault(key, []).append(candidate)
    seeds = max(map(len, tried.values()), default=0)
    rows = [
        {
            **settings[key],
            "seeds": len(seen),
            # a seed that diverged has no such epoch: it counts, with accuracy 0
            "accuracy": sum(one["accuracy"] for one in seen) / seeds,
            "loss": sum(one["loss"] for one in seen) / len(seen) if len(seen) == seeds else math.inf,
        }
        for key, seen in tried.items()
    ]
    if not rows:
        return {}, []
    best = max(range(len(rows)), key=lambda i: (rows[i]["accuracy"], -rows[i]["loss"]))
    return list(settings.values())[best], rows


def beyond(values: Sequence[float], best: float) -> float | None:
    """The value that follows `best` where it is the smallest or largest of `values`; None where it lies between others.

    The series goes on as it came: 1e-3, 3e-3, 1e-2 is followed by 3e-2 and preceded by 3e-4.
    """
    line = sorted(set(values), reverse=best == min(values))
    if len(line) < 2 or line[-1] != best:
        return None
    base, ratio = (line[-1], line[-1] / line[-2]) if len(line) == 2 else (line[-2], line[-1] / line[-3])
    return float(f"{base * ratio:.6g}")


def next_choice(best: Setting, tried: Sequence[Setting], grow: Mapping[str, int], given: Sequence[Setting]) -> Setting:
    """The next choice to try where the best one lies at an edge of a setting that may grow; empty where it does not.

    Args:
        best: the best of what was tried.
        tried: all choices so far, those of the grid (`given`) among them.
        grow: setting -> how many values may be added to those of the grid.
    """
    for key, limit in grow.items():
        values = [choice[key] for choice in tried if key in choice]
        if key in best and len(set(values)) - len({choice[key] for choice in given}) < limit:
            value = beyond(values, best[key])
            if value is not None:
                return {**{name: best[name] for name in given[0]}, key: value}
    return {}
