"""Which preset a folder of images gets where the user names none: the best that fits the time that is allowed."""

from __future__ import annotations

import time
from itertools import islice

import torch

from fewtune.config import Preset, Recipe, presets, recipe_from
from fewtune.errors import ConfigError, ModelError
from fewtune.importance import random_importance
from fewtune.methods.linear import linear_head
from fewtune.methods.reach import count_units
from fewtune.progress import duration
from fewtune.selection import select
from fewtune.training.loaders import pick_device
from fewtune.training.tuners import Share
from fewtune.training.work import Work
from fewtune.tuning import attach

TIMED = 3
"""Steps that are timed, after one that is not."""
BESIDE = 3
"""What is done once beside the epochs (the probe's features, two views scored), in epochs."""
JUDGING = 1 / 3
"""What an image costs in validation, in training steps of an image."""


def preset_for(work: Work, seconds: float | None) -> tuple[Recipe, str]:
    """The recipe of a prepared run with the preset that it gets, and a line that says which and why.

    Args:
        work: its recipe's settings are those that the user gave; they always win.
        seconds: that the user allows; None for as long as it takes.
    """
    best, kept = _with(work, "best")
    if seconds is None:
        return best, f"preset=best, since none is named and no --time is given{kept}"
    needed = estimate(work.renewed(best))
    times = f"it takes about {duration(needed)} here, and --time allows {duration(seconds)}"
    if needed <= seconds:
        return best, f"preset=best, since {times}{kept}"
    fast, kept = _with(work, "fast")
    return fast, f"preset=fast and not best, since {times}{kept}"


def estimate(work: Work) -> float:
    """About how many seconds a run by epochs will take here, from a few steps of its images and model.

    The steps train random connections, which cost what chosen ones do or a little more.
    """
    recipe, device = work.recipe, pick_device(work.recipe.accelerator)
    model = work.backbone.model.to(device).train()
    run = Share(work, device)
    scores = random_importance(model, recipe.seed, head=run.head)
    tuner = attach(model, select(scores, k=1, exclude=run.settings(Recipe).exclude))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.0)
    ends = [time.perf_counter()]
    for images, labels in islice(run.training_batches(), 1 + TIMED):
        torch.autograd.backward(run.loss(model, images.to(device), labels.to(device)))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    tuner.detach(keep=False)
    first = 1 if len(ends) > 2 else 0  # the first step is slower, and counts where there is no other
    step = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    shown = len(work.data.train) + JUDGING * (0 if work.data.val is None else len(work.data.val))
    return step * shown / recipe.batch_size * (recipe.epochs + BESIDE)


def _with(work: Work, name: Preset) -> tuple[Recipe, str]:
    """A work's recipe with a preset; what of it does not go with the user's settings or the model is left out, and
    told."""
    given = work.recipe.model_dump(include=work.recipe.model_fields_set)
    free = presets()[name].keys() - given.keys()
    unfit = free & _unfit(work)
    for also in ((), *((key,) for key in sorted(free - unfit))):
        left = unfit | set(also)
        defaults = {key: Recipe.model_fields[key].default for key in left}
        try:
            recipe = recipe_from({**given, **defaults, "preset": name})
        except ConfigError:
            continue
        return recipe, f"; without its {', '.join(sorted(left))}, which does not go with the rest" if left else ""
    return work.recipe, "; none of it goes with the other settings"


def _unfit(work: Work) -> set[str]:
    """Settings of the presets that this model or machine does not have."""
    unfit: set[str] = set()
    try:
        linear_head(work.backbone.model, work.backbone.head)
    except ModelError:
        unfit |= {"head_init"}
    try:
        count_units(work.backbone.model)
    except ModelError:
        unfit |= {"reach", "keep_prefix"}
    several = work.recipe.devices not in ("auto", 1, "1") or work.recipe.num_nodes > 1
    if several or (work.recipe.devices == "auto" and torch.cuda.device_count() > 1):
        unfit |= {"keep_prefix"}
    return unfit
