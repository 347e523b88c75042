"""Features of test images before and after tuning, in the plane by t-SNE."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from fewtune.analysis import image_features, in_the_plane, neighbours_alike
from fewtune.data import Split
from fewtune.data.transforms import eval_transform
from fewtune.errors import FewtuneError, one_line
from fewtune.methods import load_task_file
from fewtune.models import Backbone, backbone_from_description
from fewtune.progress import shown
from fewtune.report import charts
from fewtune.report.reading import Run
from fewtune.training.loaders import image_loader, pick_device

log = logging.getLogger("fewtune")

MOST, FEWEST = 300, 30
"""Test images in the plane."""
SECONDS = 10.0
"""That the features of all of them may take, before and after together; a slow model gets fewer images."""
BATCH = 16
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Planes:
    """Two charts, before and after, or why there are none.

    alike: share of the images whose nearest other image is of their class, before and after.
    """

    charts: tuple[str, ...] = ()
    images: int = 0
    alike: tuple[float, float] = (0.0, 0.0)
    absent: str | None = None


def planes(run: Run) -> Planes:
    """The features of a classification run's test images; `absent` says why where data or model cannot be had."""
    if len(run.rows) < FEWEST:
        return Planes(absent=f"They need at least {FEWEST} test images; this run had {len(run.rows)}.")
    try:
        test = run.images.test
        if test is None or [row["file"] for row in run.rows] != list(test.names):
            return Planes(absent=f"They are not shown: {run.recipe['data']} holds other images than it did.")
        return _drawn(run, test)
    except (FewtuneError, OSError) as error:
        return Planes(absent=f"They are not shown: {one_line(error)}.")


def _drawn(run: Run, test: Split) -> Planes:
    delta = load_task_file(run.path / "delta.safetensors")
    names = delta.metadata["class_names"]
    backbone = backbone_from_description(delta.metadata["backbone"], len(names))
    images = test.with_transform(eval_transform(delta.metadata.get("transform", "none"), backbone))
    device = pick_device(run.recipe.get("accelerator", "auto"))
    count = min(MOST, len(test), _affordable(backbone, images, device))
    if count < FEWEST:
        return Planes(absent=f"They are not shown: of this model they would take more than {SECONDS:.0f} seconds.")
    chosen = _evenly(test, count)
    log.info("report: features of %d test images, before and after", count)
    loader = image_loader(images.subset(chosen), BATCH)
    steps = len(loader)
    before, labels = image_features(backbone.model, shown(loader, "features before", steps), backbone.head, device)
    delta.apply(backbone.model)
    after, _ = image_features(backbone.model, shown(loader, "features after", steps), backbone.head, device)
    perplexity = min(PERPLEXITY, (count - 1) / 3)
    wrong = np.array([run.rows[i]["label"] != run.rows[i]["prediction"] for i in chosen])
    told, coloured = [names[label] for label in labels], _coloured(run)
    drawn = [
        charts.plane(title, in_the_plane(points, perplexity=perplexity), told, coloured, ringed)
        for title, points, ringed in (
            ("before tuning", before, np.zeros_like(wrong)),
            ("after tuning", after, wrong),
        )
    ]
    return Planes(tuple(drawn), count, (neighbours_alike(before, labels), neighbours_alike(after, labels)))


def _affordable(backbone: Backbone, images: Split, device: torch.device) -> int:
    """How many images there is time for, from the time of a second batch; the first one warms up."""
    batch = next(iter(image_loader(images.subset(range(min(BATCH, len(images)))), BATCH)))
    for _ in range(2):
        started = time.perf_counter()
        image_features(backbone.model, [batch], backbone.head, device)
        seconds = time.perf_counter() - started
    return int(SECONDS / (2 * seconds / len(batch[0])))


def _evenly(test: Split, count: int) -> list[int]:
    """So many images, of each class in proportion, always the same."""
    by_class = sorted(range(len(test)), key=lambda index: (str(test.labels[index]), index))
    return sorted({by_class[i] for i in np.linspace(0, len(test) - 1, count).round().astype(int)})


def _coloured(run: Run) -> list[str]:
    """The classes that get a colour: of more than there are colours those with the most mistakes."""
    classes = sorted({row["label"] for row in run.rows})
    if len(classes) <= len(charts.COLOURS):
        return classes
    mistakes = Counter(row[key] for row in run.rows if row["label"] != row["prediction"] for key in COUNTED)
    return sorted(sorted(classes, key=lambda name: -mistakes[name])[: len(charts.COLOURS) - 1])


COUNTED = ("label", "prediction")
"""A mistake counts for both of its classes."""
