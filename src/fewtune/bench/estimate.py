"""Checks before a grid starts: that the images of all tasks are there, and how long the runs will take.

Time is counted in passes: an image forward and backward through the model once. A pass without backward counts a third.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fewtune.bench.plan import Kind
from fewtune.config import Recipe
from fewtune.errors import ConfigError, FewtuneError, ModelError
from fewtune.methods import METHODS
from fewtune.models import load_backbone, logits
from fewtune.tasks import TASKS

FORWARD = 1 / 3
"""A forward pass beside a forward and a backward one."""


@dataclass(frozen=True)
class Sizes:
    """How many images a task has."""

    train: int
    val: int
    test: int

    def passes(self, kind: Kind, recipe: Recipe) -> float:
        """Passes of one run: its epochs with their validation, or with the test at the end."""
        if not METHODS[recipe.method].trains_by_epochs(recipe.task):
            return FORWARD * (self.train + self.val + (self.test if kind == "train" else 0))
        epochs = recipe.stop_after or recipe.epochs
        if kind == "choose":
            return epochs * (self.train + FORWARD * self.val)
        return epochs * (self.train + self.val) + FORWARD * self.test


def sizes_of(recipes: Mapping[str, Recipe]) -> dict[str, Sizes]:
    """Task -> its images, listed and not opened.

    Raises:
        ConfigError: names every task whose data is not as its recipe says.
    """
    sizes, mistakes = {}, []
    for task, recipe in recipes.items():
        try:
            sizes[task] = _sizes(recipe)
        except FewtuneError as error:
            mistakes.append(f"tasks.{task}: {error}")
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the grid's data: {'; '.join(mistakes)}")
    return sizes


def _sizes(recipe: Recipe) -> Sizes:
    splits = TASKS[recipe.task].images(recipe)
    return Sizes(**{name: len(splits.get(name, ())) for name in ("train", "val", "test")})


def seconds_a_pass(done: Iterable[tuple[float, float]], recipe: Recipe, threads: int) -> float:
    """Seconds of one pass: of finished runs (passes, seconds), else of two steps of the whole model, tried here."""
    of_done = median_a_pass(done)
    return _tried(recipe, threads) if math.isnan(of_done) else of_done


def median_a_pass(done: Iterable[tuple[float, float]]) -> float:
    """Seconds of one pass of finished runs (passes, seconds): the median, which runs that slept do not move; or NaN."""
    each = [seconds / passes for passes, seconds in done if passes]
    return statistics.median(each) if each else math.nan


def _tried(recipe: Recipe, threads: int) -> float:
    """Seconds of a pass through a fresh model; NaN where it is no backbone but a segmenter."""
    size, layout = recipe.image_size, recipe.arch
    try:
        backbone = load_backbone(recipe.model, num_classes=2, image_size=size, pretrained=False, architecture=layout)
    except ModelError:
        return math.nan
    images = torch.zeros(min(8, recipe.batch_size), 3, backbone.image_size, backbone.image_size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = []
        for _ in range(3):  # the first sets things up
            started = time.perf_counter()
            logits(backbone.model(images)).sum().backward()
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return min(times) / len(images)
