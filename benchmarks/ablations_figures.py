"""The figures of the ablations, from the folders of finished runs."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ablations_analysis import agreements, locations, overlaps
from ablations_grid import SHOTS, TASK, TRIALS, Trial


def losses(folder: Path) -> dict[str, float]:
    """Cross-entropy of every test image, nats, from a run's predictions (probabilities have six decimals)."""
    with (folder / "test_predictions.csv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: -math.log(max(float(row[f"p({row['label']})"]), 1e-6)) for row in csv.DictReader(file)}


def collect(trials: Iterable[Trial], out: Path, against: str | None = "gps") -> dict[str, Any]:
    """Name -> what came of its runs over the seeds, and its differences from the trials called `against`."""
    named: dict[str, list[Trial]] = {}
    for trial in trials:
        if (out / trial.key / "metrics.json").exists():
            named.setdefault(trial.name, []).append(trial)
    return {name: _row(found, named.get(against or "", []), out) for name, found in named.items()}


def _row(trials: list[Trial], reference: list[Trial], out: Path) -> dict[str, Any]:
    metrics = [json.loads((out / trial.key / "metrics.json").read_text()) for trial in trials]
    pairs = [(a, b) for a in trials for b in reference if a.draw == b.draw and a.name != b.name]
    return {
        "seeds": [trial.draw.seed for trial in trials],
        "accuracy": [m["test"]["accuracy"]["value"] for m in metrics],
        "loss": [statistics.mean(losses(out / trial.key).values()) for trial in trials],
        "validation": [m["validation"]["accuracy"] for m in metrics],
        "test_images": metrics[0]["test"]["images"],
        "trained": metrics[0]["trained"],
        "percent": metrics[0]["percent_of_backbone"],
        "seconds": statistics.median(m["seconds"] for m in metrics),
        "lr": _rate(trials[0], out),
        **_differences([(out / a.key, out / b.key) for a, b in pairs]),
    }


def _rate(trial: Trial, out: Path) -> float | None:
    return None if trial.rate is None else json.loads((out / f"rate-{trial.rate}.json").read_text())["lr"]


def _differences(pairs: list[tuple[Path, Path]]) -> dict[str, Any]:
    """Accuracy and loss minus the reference's: the mean over the common seeds of an image is one observation."""
    if not pairs:
        return {}
    import numpy as np

    from fewtune.metrics import bootstrap
    from fewtune.training.probabilities import paired_hits

    hits = [np.subtract(*paired_hits(*(folder / "test_predictions.csv" for folder in pair))) for pair in pairs]
    nats = []
    for mine, other in pairs:
        a, b = losses(mine), losses(other)
        nats.append(np.array([a[name] - b[name] for name in sorted(a)]))
    found: dict[str, Any] = {"common_seeds": len(pairs), "difference_by_seed": [float(h.mean()) for h in hits]}
    for key, values in (("accuracy_difference", hits), ("loss_difference", nats)):
        interval = bootstrap(np.mean(values, axis=0))
        found[key] = [interval.value, interval.low, interval.high]
    return found


def figures(out: Path) -> dict[str, Any]:
    """Everything that the page and the plots show."""
    on_task = [trial for trial in TRIALS if trial.draw.task == TASK]
    few = {str(shots): collect([t for t in TRIALS if t.draw.shots == shots], out) for shots in SHOTS}
    unfinished: dict[str, list[str]] = {}
    for trial in TRIALS:
        if not (out / trial.key / "metrics.json").exists():
            unfinished.setdefault(trial.draw.key, []).append(trial.name)
    return {
        "trials": collect(on_task, out),
        "few_shot": {shots: rows for shots, rows in few.items() if rows},
        "agreement": agreements(out),
        "overlap": overlaps(out),
        "location": locations(out),
        "rates": {file.stem: json.loads(file.read_text())["tried"] for file in sorted(out.glob("rate-*.json"))},
        "not_run": unfinished,
    }
