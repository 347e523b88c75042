"""Findings that open a report, in sentences; each follows from numbers that the run recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewtune.metrics import Interval
from fewtune.report.reading import Run

OFF = 0.05
"""Calibration error, and fall of a class's recall, from which a sentence is worth its place."""
FEW = 20
"""Test images of a class under which its recall is a guess."""
WIDE = 0.08
"""Width of an interval from which two settings can hardly be told apart."""


def findings(run: Run) -> list[str]:
    """Sentences about a run, what costs most first."""
    return [*_classes(run), *_masks(run), *_training(run), *_confidence(run), *_certainty(run)]


def advice(runs: Sequence[Run], differences: Mapping[str, Interval]) -> Iterator[str]:
    """What follows from a comparison: what to take where nothing can be told apart, and what one seed cannot say."""
    if not differences:
        return
    if all(one.low <= 0 <= one.high for one in differences.values()):
        least = min(runs, key=lambda run: run.metrics["trained"])
        yield (
            f"Take the cheapest: {least.name} trains the fewest parameters "
            f"({least.metrics['percent_of_backbone']:.2f} % of the backbone). More test images may tell the runs apart."
        )
    if len({run.metrics["seed"] for run in runs}) == 1:
        yield (
            "All runs have the same seed, and another seed may order them differently. Before you decide, "
            "repeat them with others (seed=1, seed=2), or let fewtune bench do so."
        )


def confusions(test: dict[str, Any], most: int = 10) -> list[dict[str, Any]]:
    """The most frequent mistakes: true class, predicted class, images, and their share of the true class's images."""
    names, matrix, support = test["class_names"], test["confusion"], test["support"]
    pairs = [
        {"truth": names[i], "prediction": names[j], "images": n, "share": n / max(1, support[i])}
        for i, row in enumerate(matrix)
        for j, n in enumerate(row)
        if i != j and n
    ]
    return sorted(pairs, key=lambda pair: -pair["images"])[:most]


def _classes(run: Run) -> Iterator[str]:
    test = run.metrics.get("test", {})
    if "recall" not in test or "confusion" not in test:
        return
    mistakes = sum(map(sum, test["confusion"])) - sum(row[i] for i, row in enumerate(test["confusion"]))
    if pairs := confusions(test, 1):
        worst = pairs[0]
        yield (
            f"The most frequent mistake takes {worst['truth']} for {worst['prediction']}: {worst['images']} of "
            f"{mistakes} mistakes. Look at those pictures first. If the labels are wrong, correct them; if they are "
            "right, more images of these two classes help most."
        )
    columns = zip(test["recall"], test["class_names"], test["support"], strict=True)
    recall, name, n = min(row for row in columns if row[2])
    if recall < test["accuracy"]["value"] - 2 * OFF:
        few = f" It has {n} test images only, so this is a rough figure." if n < FEW else ""
        yield f"{name} is recognised worst: {100 * recall:.0f} % of its images are right.{few}{_rare(test, name)}"
    predicted = [sum(column) for column in zip(*test["confusion"], strict=True)]
    if never := [name for name, count in zip(test["class_names"], predicted, strict=True) if not count]:
        yield f"Never predicted: {', '.join(never[:5])}{' and others' if len(never) > 5 else ''}."


def _rare(test: dict[str, Any], name: str) -> str:
    """What to try where a class has less than half of the images that others have on average."""
    support = dict(zip(test["class_names"], test["support"], strict=True))
    return (
        " It is rare: try class_weights=balanced." if 2 * support[name] < sum(support.values()) / len(support) else ""
    )


def _masks(run: Run) -> Iterator[str]:
    if not run.draws_masks:
        return
    scores = sorted(((score, name) for name, score in run.scores().items()), key=lambda pair: pair[0])
    missed = sum(score < 0.1 for score, _ in scores)
    if missed and not run.class_masks:
        yield f"In {missed} of {len(scores)} test images the object is missed nearly wholly (Dice below 0.1)."
    yield f"The worst image is {scores[0][1]}, with a Dice of {scores[0][0]:.2f}."


def _training(run: Run) -> Iterator[str]:
    kept = run.metrics.get("validation", {}).get("epoch")
    losses = [entry["val_loss"] for entry in run.history if "val_loss" in entry]
    if kept is None or len(losses) < 3:
        return
    if kept == len(losses) - 1 and losses[-1] <= min(losses):
        yield f"The last epoch was the best, and its loss the lowest: try more epochs (epochs={2 * len(losses)})."
    elif kept < len(losses) // 2:
        yield (
            f"The best epoch was {kept + 1} of {len(losses)}; after it, validation got worse. Try a smaller learning "
            f"rate (lr={run.recipe['lr'] / 3:.1g}), augmentation (augment=flip or fgvc), or more images."
        )


def _confidence(run: Run) -> Iterator[str]:
    error = run.metrics.get("test", {}).get("calibration_error")
    if error is None or error < OFF or not run.rows:
        return
    stated, hit = run.confidences()
    way = "too sure of itself" if stated.mean() > hit.mean() else "less sure than it could be"
    yield (
        f"The model is {way}: it states {100 * stated.mean():.0f} % on average and is right in "
        f"{100 * hit.mean():.0f} %. Do not read its probabilities as they are."
    )


def _certainty(run: Run) -> Iterator[str]:
    value = run.metrics.get("test", {}).get(run.measure)
    if value is not None and value["high"] - value["low"] > WIDE:
        yield (
            f"The interval is {100 * (value['high'] - value['low']):.0f} points wide. Compare settings on the same "
            "test images (fewtune report RUN RUN); only more test images make it narrower."
        )
