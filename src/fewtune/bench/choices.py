"""Which choice is best on validation images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fewtune.bench.plan import Run

Setting = dict[str, Any]


def chosen(runs: Iterable[Run], out: Path) -> tuple[Setting, list[dict[str, Any]]]:
    """The best choice with its number of epochs (or the probe's regularisation), and a row for all that was tried.

    Accuracies and losses are means over the choosing seeds; the best is the one with the highest accuracy, of equals
    the one with the lowest loss, of equals the first. A run whose loss became infinite counts as accuracy 0. Only files
    that were made from validation images are read.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    settings: dict[str, Setting] = {}
    for run in runs:
        judged = json.loads(run.result(out).read_text(encoding="utf-8"))
        for candidate in judged["candidates"] or [{"setting": {}, "accuracy": 0.0, "loss": math.inf}]:
            setting = {**run.choice, **candidate["setting"]}
            key = json.dumps(setting, default=str)
            settings[key] = setting
            found.setdefault(key, []).append(candidate)
    seeds = max(map(len, found.values()), default=0)
    rows = [
        {
            **settings[key],
            "seeds": len(judged),
            # a seed that diverged has no such epoch: it counts, with accuracy 0
            "accuracy": sum(one["accuracy"] for one in judged) / seeds,
            "loss": sum(one["loss"] for one in judged) / len(judged) if len(judged) == seeds else math.inf,
        }
        for key, judged in found.items()
    ]
    if not rows:
        return {}, []
    best = max(range(len(rows)), key=lambda i: (rows[i]["accuracy"], -rows[i]["loss"]))
    return list(settings.values())[best], rows
