"""`fit`: from a recipe to a run folder with a task file.

Validation images are split off the training images, the best epoch by validation accuracy is kept (of equals the one
with the lower validation loss), and the test set is read once, at the end. With `train_on="train+val"` there is
nothing to judge an epoch by: the last one is kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fewtune.config import Recipe
from fewtune.errors import ConfigError, FewtuneError, one_line
from fewtune.files import Json, read_json, write_csv, write_json
from fewtune.hub import is_address, pinned
from fewtune.methods import METHODS, Tuner
from fewtune.methods.reach import find_border
from fewtune.objectives import Objective
from fewtune.training.cluster import LOCAL
from fewtune.training.images import Transform
from fewtune.training.learner import BEFORE, Learner, NonFiniteLoss, kept_state
from fewtune.training.loaders import seed_all
from fewtune.training.memory import file_size, peak_memory
from fewtune.training.precision import offer
from fewtune.training.run_folder import RunFolder, draw_curves
from fewtune.training.stages import Stages, rewind
from fewtune.training.trackers import check_tracker, results, tracked
from fewtune.training.trainer import ProcessLost, SaveEpochs, build_trainer, is_main, lost_connection, run_trainer
from fewtune.training.tuners import Share, begin, fit_at_once, make_tuner, method_of
from fewtune.training.work import Work

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what stands in its metrics.json."""

    folder: RunFolder
    metrics: Json


def fit(
    recipe: Recipe | None,
    out: str | Path,
    prepare: Callable[[Recipe], Work],
    *,
    resume: bool = False,
    overwrite: bool = False,
    search: bool = False,
    on: str = LOCAL,
    threads: int = 1,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    train_transform: Transform | None = None,
    objective: Objective | None = None,
) -> Result:
    """Select, train, test once, and write the run folder `out`.

    Args:
        recipe: the settings; None with `resume` takes those of the run that lies in `out`.
        prepare: turns the recipe into work, as its kind of task does.
        resume: go on after the last finished epoch; on a CPU the numbers are those of an uninterrupted run.
        overwrite: throw away the run that lies in `out`.
        search: first choose lr, k (and drop path) on validation images, see `fewtune.training.search`.
        on, threads: where the short runs of a search are done: "local", "ray" or "ray://HOST:PORT"; threads of each.
        callbacks: of Lightning, beside fewtune's own.
        loggers: of Lightning, beside TensorBoard's.
        train_transform: in place of the recipe's augmentation: PIL image -> tensor [3, size, size], normalised as the
            model wants it; for masks (image, mask) -> (tensor, mask). Importance looks at two results of it an image.
        objective: what importance is the gradient of, ``objective(model, inputs, labels) -> scalar``, in place of the
            recipe's. A resumed run must be given the same four again: no file records them.

    Raises:
        FewtuneError: of the kind that says what the user can mend; nothing is written before model and data are good.
        OSError: the folder cannot be written.
    """
    folder, main = RunFolder(Path(out)), is_main()
    if recipe is not None and is_address(recipe.oracle or ""):
        recipe = recipe.changed(oracle=pinned(recipe.oracle))
    if main:
        folder.check(resume=resume, overwrite=overwrite)
    begun = folder.config.exists() and (resume or (search and not main))
    searching = resume and not begun and folder.unsearched.exists()
    if begun or searching:
        recipe = folder.resumed(recipe, searched=search and begun)
    if recipe is None:
        raise ConfigError(f"{folder.path} holds no run to resume; say --model and --data to begin one")
    if begun and folder.metrics.exists():
        log.info("%s is complete already", folder.path)
        return Result(folder, read_json(folder.metrics))
    check_tracker(recipe)
    seed_all(recipe.seed)
    if (callbacks or loggers) and not METHODS[recipe.method].trains_by_epochs(recipe.task):
        raise ConfigError(f"method={recipe.method} has no epochs for callbacks or loggers to follow; leave them out")
    work = replace(prepare(recipe), train_transform=train_transform, importance_objective=objective)
    _look_over(work, tell=main, begun=begun)
    if (search or searching) and not begun:
        work = _searched(work, folder, on, threads, goes_on=searching)
    elif main and not begun:
        folder.begin(recipe)
    try:
        return _tracked(work, folder, callbacks, loggers)
    except (FewtuneError, MisconfigurationException):
        if main and not begun and not folder.search.exists():  # what a search chose is worth keeping
            folder.abandon()
        raise


def _look_over(work: Work, *, tell: bool, begun: bool) -> None:
    """Refuse a run before its folder is begun, and say what its user may want to know."""
    recipe = work.recipe
    if work.data.test is None and tell:
        log.info("no images are set aside for a test; test_fraction=0.2 keeps a fifth of them to score the task on")
    if tell and not begun and (line := offer(work)) is not None:
        log.info("%s", line)
    if recipe.reach is not None:
        find_border(work.backbone.model, recipe.reach)
    check = METHODS[recipe.method].check
    if check is not None and not begun:
        check(Share(work, torch.device("cpu")))


def _searched(work: Work, folder: RunFolder, on: str, threads: int, *, goes_on: bool) -> Work:
    """The work with the settings that a search chose, and the folder of the run begun with them."""
    from fewtune.training.search import check_search, search_recipe

    check_search(work.recipe, method_of(work))
    if not goes_on:
        folder.begin_search(work.recipe)
    try:
        chosen = search_recipe(work, folder.study, on, threads)
    except FewtuneError:
        if not goes_on:
            folder.abandon()
        raise
    write_csv(folder.search, chosen.rows)
    folder.begin(chosen.best, searched=True)
    return work.renewed(chosen.best)


def _tracked(work: Work, folder: RunFolder, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Result:
    """The run, followed by the recipe's tracker, which is told the test's figures at the end."""
    with tracked(work.recipe, folder) as trackers:
        result = _run(work, folder, callbacks, [*loggers, *trackers])
        if is_main():
            for one in trackers:
                one.log_metrics(results(result.metrics))
        return result


def _run(work: Work, folder: RunFolder, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Result:
    recipe, started, earlier = work.recipe, time.perf_counter(), 0.0
    tuner: Tuner
    start: dict[str, Any] | None = None
    history: list[dict[str, float]] = []
    if method_of(work).trains_by_epochs(recipe.task):
        module = train(work, folder, callbacks, loggers)
        if module.sharded:
            work, module.tuner = _whole_again(work, folder, module)
        tuner, start, history, earlier = module.tuner, module.start, module.history, module.earlier
        chosen = {key: value for key, value in (module.best or {}).items() if key != "state"}
    else:
        fitted = fit_at_once(work)
        tuner, chosen = fitted.tuner, fitted.validation
    metrics = {
        "task": recipe.task,
        "method": recipe.method,
        "model": recipe.model,
        "data": recipe.data,
        "seed": recipe.seed,
        "trained": tuner.trained,
        "backbone_parameters": tuner.backbone_parameters,
        "percent_of_backbone": 100 * tuner.trained / tuner.backbone_parameters,
        "train_images": len(work.data.train),
        "validation": chosen,
        "seconds": earlier + time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    if is_main():
        metrics = _finish(work, folder, tuner, history, metrics)
        if start is not None:
            metrics["start"] = _tested_start(work, folder, tuner, start)
        _write(folder, metrics)
    return Result(folder, metrics)


def train(work: Work, folder: RunFolder, callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] = ()) -> Learner:
    """Train with Lightning, from the folder's checkpoint where there is one, and load the best epoch."""
    module = work.learner(lambda learner: make_tuner(work, folder, learner))
    every: list[Any] = [TensorBoardLogger(folder.path, name="tensorboard", version=""), *loggers]
    saving = SaveEpochs(folder.checkpoint, folder.history)
    stages = [Stages(work, folder)] if work.recipe.stages > 1 else []
    if stages:
        rewind(folder)
    trainer = build_trainer(work.recipe, folder.path, callbacks=[*stages, saving, *callbacks], logger=every)
    checkpoint = folder.checkpoint if folder.checkpoint.exists() else None
    if checkpoint is None:
        begin(work, module)
    try:
        run_trainer(trainer, module, work.recipe, checkpoint)
    except NonFiniteLoss:
        if module.best is not None and trainer.is_global_zero and not module.sharded:  # no gathering by one alone
            module.load_best()
            _save_delta(work.settled(), folder, module.tuner, {"epoch": module.best["epoch"]})
        raise
    except RuntimeError as error:
        if trainer.world_size > 1 and lost_connection(error):
            raise ProcessLost(_how_to_go_on(folder, module, error)) from error
        raise
    module.load_best()
    if module.best is not None and module.best["epoch"] == BEFORE and module.start is not None:
        log.info("no epoch was better on validation images than the %s, which is kept", module.start["name"])
    return module


def _how_to_go_on(folder: RunFolder, module: Learner, error: RuntimeError) -> str:
    """What to tell where another process of the run has ended."""
    rank, world = module.trainer.global_rank, module.trainer.world_size
    after = (
        f"goes on after epoch {len(module.history)}" if module.history else "begins anew, since no epoch was finished"
    )
    return (
        f"process {rank} of {world} lost another one of its run ({one_line(error)}); once the cause is mended, "
        f"fewtune fit --resume --out {folder.path}, started in the same way, {after}"
    )


def _whole_again(work: Work, folder: RunFolder, module: Learner) -> tuple[Work, Tuner]:
    """A fresh model with the best epoch's state, whole in every process: the main one tests it alone."""
    assert module.best is not None
    whole = work.renewed(work.recipe)
    tuner = make_tuner(whole, folder, module)
    tuner.load_state_dict(module.best["state"])
    return whole, tuner


def _finish(
    work: Work, folder: RunFolder, tuner: Tuner, history: list[dict[str, float]], metrics: Json
) -> dict[str, Any]:
    """Save the task file, and read the test set once."""
    work = work.settled()
    _save_delta(work, folder, tuner, metrics["validation"])
    metrics["delta_bytes"] = file_size(folder.delta)
    metrics |= work.test(folder)
    if history:
        metrics["training_seconds"] = sum(entry["seconds"] for entry in history)
        draw_curves(history, folder.curves)
    return metrics


def _tested_start(work: Work, folder: RunFolder, tuner: Tuner, start: dict[str, Any]) -> dict[str, Any]:
    """What validation and test images say of the state in which training began; the tuned model is left as it is."""
    tuned = kept_state(tuner.state_dict())
    tuner.load_state_dict(start["state"])
    try:
        return {"name": start["name"], "validation": start["validation"], **work.test_start(folder)}
    finally:
        tuner.load_state_dict(tuned)


def _write(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """The run's result as CSV, and as metrics.json: with that a run is complete."""
    flat = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    flat |= {f"validation_{key}": value for key, value in metrics["validation"].items() if not isinstance(value, dict)}
    intervals = {name: interval for name, interval in metrics.get("test", {}).items() if isinstance(interval, dict)}
    flat |= {f"test_{name}_{key}": value for name, interval in intervals.items() for key, value in interval.items()}
    write_csv(folder.metrics.with_suffix(".csv"), [flat])
    write_json(folder.metrics, metrics)


def _save_delta(work: Work, folder: RunFolder, tuner: Tuner, chosen: dict[str, Any]) -> None:
    metadata = work.describe(validation=chosen)
    with torch.no_grad():
        tuner.delta(metadata).save(folder.delta)
