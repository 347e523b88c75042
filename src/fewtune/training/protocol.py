"""`fit`: from a recipe to a run folder with a task file.

Validation images are split off the training images, the best epoch by validation accuracy is kept (of equals the one
with the lower validation loss), and the test set is read once, at the end. With `train_on="train+val"` there is
nothing to judge an epoch by: the last one is kept.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fewtune.config import Recipe
from fewtune.data import ImageData, Split, eval_transform, load_data, train_transform
from fewtune.data.transforms import two_views
from fewtune.errors import ConfigError, DataError
from fewtune.methods import METHODS, Tuner
from fewtune.metrics import report
from fewtune.models import Backbone, load_backbone
from fewtune.objectives import CrossEntropy, Objective, SupCon
from fewtune.training.classifying import Classifier, training_loss
from fewtune.training.files import csv_text, write_json, write_text
from fewtune.training.folder import RunFolder, draw_curves
from fewtune.training.loaders import image_loader, seed_all
from fewtune.training.measure import file_size, peak_memory
from fewtune.training.module import Learner, NonFiniteLoss
from fewtune.training.ood import check_sets, score_sets
from fewtune.training.probabilities import pick_device, prediction_rows, probabilities, write_predictions
from fewtune.training.recompute import recompute_activations
from fewtune.training.task import describe_task
from fewtune.training.trainer import SaveEpochs, build_trainer, is_main
from fewtune.training.tuners import Share, fit_at_once, make_tuner, method_of
from fewtune.training.work import Work

log = logging.getLogger("fewtune")

DECODED_FIRST = 20_000
"""A set of at most so many images is decoded once before anything else is done."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what stands in its metrics.json."""

    folder: RunFolder
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ImageWork(Work):
    """Classification: labelled images with their transforms, and the backbone with a fresh head."""

    data: ImageData
    backbone: Backbone
    learner_class = Classifier

    @property
    def train(self) -> Split:
        """Training images as the recipe shows them."""
        return self.data.train.with_transform(train_transform(self.recipe.augment, self.backbone))

    def evaluated(self, split: Split) -> Split:
        """Images of a split as they are evaluated."""
        return split.with_transform(eval_transform(self.recipe.augment, self.backbone))

    def learner(self, attach: Callable[[Learner], Tuner]) -> Classifier:
        """Trains on the training images, judges on the validation images, where there are some."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return Classifier(self.backbone.model, self.recipe, self.train, val, self.data.num_classes, attach)

    @property
    def scored(self) -> Split:
        """Training images in two views each, which the contrastive loss contrasts."""
        return self.data.train.with_transform(two_views(self.backbone))

    @property
    def objective(self) -> Objective:
        """The supervised contrastive loss, or cross-entropy through the new head."""
        return SupCon(self.recipe.temperature) if self.recipe.objective == "supcon" else CrossEntropy()

    @property
    def loss(self) -> Objective:
        """Cross-entropy."""
        return training_loss(self.recipe, self.data.train.labels, self.classes)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.data.num_classes

    def renewed(self, recipe: Recipe) -> ImageWork:
        """The same images with another fresh backbone."""
        return replace(self, recipe=recipe, backbone=fresh_backbone(recipe, self.data))

    def describe(self, **more: Any) -> dict[str, Any]:
        """With the class names."""
        return describe_task(self.recipe, self.backbone, self.data.class_names, **more)

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """Report and predictions of the test images; scores on sets beside ImageNet-1k where the recipe asks for it."""
        metrics: dict[str, Any] = {}
        test, names = self.data.test, self.data.class_names
        if test is not None:
            loader = image_loader(self.evaluated(test), self.recipe.batch_size, workers=self.recipe.workers)
            begun = time.perf_counter()
            found, labels = probabilities(self.backbone.model, loader, pick_device(self.recipe.accelerator), "test")
            metrics["test_seconds"] = time.perf_counter() - begun
            metrics["test"] = report(found, labels, names).to_json()
            write_predictions(folder.predictions, prediction_rows(test.names, found, names, test.labels))
        if self.recipe.ood:
            metrics["ood"] = score_sets(self.recipe, self.backbone, names)
        return metrics


def fit(
    recipe: Recipe | None,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    search: bool = False,
    prepared: Callable[[Recipe], Work] | None = None,
) -> Result:
    """Select, train, test once, and write the run folder `out`.

    Args:
        recipe: the settings; None with `resume` takes those of the run that lies in `out`.
        resume: go on after the last finished epoch; on a CPU the numbers are those of an uninterrupted run.
        overwrite: throw away the run that lies in `out`.
        search: first choose lr, k (and drop path) on validation images, see `fewtune.training.search`.
        prepared: turns the recipe into work; left out, that of classification.

    Raises:
        FewtuneError: of the kind that says what the user can mend; nothing is written before model and data are good.
        OSError: the folder cannot be written.
    """
    folder, main = RunFolder(Path(out)), is_main()
    if main:
        folder.check(resume=resume, overwrite=overwrite)
    begun = folder.config.exists() and (resume or (search and not main))
    if begun:
        recipe = folder.resumed(recipe, searched=search)
    if recipe is None:
        raise ConfigError(f"{folder.path} holds no run to resume; say --model and --data to begin one")
    if begun and folder.metrics.exists():
        log.info("%s is complete already", folder.path)
        return Result(folder, json.loads(folder.metrics.read_text(encoding="utf-8")))
    seed_all(recipe.seed)
    work = (prepared or prepare)(recipe)
    check = METHODS[recipe.method].check
    if check is not None and not begun:
        check(Share(work, torch.device("cpu")))  # refused here, if it is, before the folder is begun
    if search and not begun:
        from fewtune.training.search import search_recipe

        found = search_recipe(work)
        recipe = found.best
        work = work.renewed(recipe)
    if main and not begun:
        folder.begin(recipe)
        if search:
            write_text(folder.search, csv_text(found.rows))
    return _run(work, folder)


def prepare(recipe: Recipe) -> ImageWork:
    """Load and check data and backbone; DataError or ModelError where they are not what a recipe needs."""
    if recipe.task != "classification":
        raise ConfigError(f"task={recipe.task} is fitted by fewtune.{recipe.task}.fit, or by the command line")
    if recipe.ood:
        check_sets(recipe.ood, recipe.data)
    data = load_data(
        recipe.data,
        seed=recipe.seed,
        val_fraction=recipe.val_fraction,
        test_fraction=recipe.test_fraction,
        limit_train=recipe.limit_train,
        limit_test=recipe.limit_test,
        shots=recipe.shots,
        progress=log.info,
    )
    if data.val is None:
        raise DataError(f"{data.name} has too few training images to split validation images off")
    if recipe.train_on == "train+val":
        data = replace(data, train=data.train.joined(data.val), val=None)
    # A damaged image ends a long run at its first epoch; of a large set that is found by `fewtune data check`.
    data.check(decode=sum(map(len, data.splits.values())) <= DECODED_FIRST)
    log.info("%s", data.summary())
    backbone = fresh_backbone(recipe, data)
    if recipe.cache:
        size, how = backbone.image_size, backbone.interpolation
        kept: dict[str, Any] = {
            name: split.cached(size, square=True, interpolation=how) for name, split in data.splits.items()
        }
        data = replace(data, **kept)
    return ImageWork(recipe, data, backbone)


def fresh_backbone(recipe: Recipe, data: ImageData) -> Backbone:
    """The recipe's backbone with a new head for the data's classes; the same on every call."""
    backbone = load_backbone(
        recipe.model,
        num_classes=data.num_classes,
        image_size=recipe.image_size,
        pretrained=recipe.pretrained,
        drop_path=recipe.drop_path,
        architecture=recipe.arch,
        seed=recipe.seed,
        progress=log.info,
    )
    if recipe.checkpoint_activations:
        recompute_activations(backbone.model, recipe.model)
    return backbone


def _run(work: Work, folder: RunFolder) -> Result:
    recipe, started = work.recipe, time.perf_counter()
    tuner: Tuner
    history: list[dict[str, float]] = []
    if method_of(work).trains_by_epochs(recipe.task):
        module = train(work, folder)
        tuner, history = module.tuner, module.history
        chosen = {key: value for key, value in (module.best or {}).items() if key != "state"}
    else:
        fitted = fit_at_once(work)
        tuner, chosen = fitted.tuner, fitted.validation
    metrics = {
        "method": recipe.method,
        "model": recipe.model,
        "data": recipe.data,
        "seed": recipe.seed,
        "trained": tuner.trained,
        "backbone_parameters": tuner.backbone_parameters,
        "percent_of_backbone": 100 * tuner.trained / tuner.backbone_parameters,
        "train_images": len(work.data.train),
        "validation": chosen,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    if is_main():
        metrics = _finish(work, folder, tuner, history, metrics)
    return Result(folder, metrics)


def train(work: Work, folder: RunFolder) -> Learner:
    """Train with Lightning, from the folder's checkpoint where there is one, and load the best epoch."""
    module = work.learner(lambda own: make_tuner(work, folder, own))
    logger = TensorBoardLogger(folder.path, name="tensorboard", version="")
    callbacks: list[Any] = [SaveEpochs(folder.checkpoint, folder.history)]
    trainer = build_trainer(work.recipe, folder.path, callbacks=callbacks, logger=logger)
    checkpoint = folder.checkpoint if folder.checkpoint.exists() else None
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except NonFiniteLoss:
        if module.best is not None and trainer.is_global_zero:
            module.load_best()
            _save_delta(work, folder, module.tuner, {"epoch": module.best["epoch"]})
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    module.load_best()
    return module


def _finish(
    work: Work, folder: RunFolder, tuner: Tuner, history: list[dict[str, float]], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Save the task file, read the test set once, and write what came out; metrics.json last."""
    _save_delta(work, folder, tuner, metrics["validation"])
    metrics["delta_bytes"] = file_size(folder.delta)
    metrics |= work.test(folder)
    if history:
        metrics["training_seconds"] = sum(entry["seconds"] for entry in history)
        draw_curves(history, folder.curves)
    flat = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    flat |= {f"validation_{key}": value for key, value in metrics["validation"].items() if not isinstance(value, dict)}
    intervals = {name: found for name, found in metrics.get("test", {}).items() if isinstance(found, dict)}
    flat |= {f"test_{name}_{key}": value for name, found in intervals.items() for key, value in found.items()}
    write_text(folder.metrics.with_suffix(".csv"), csv_text([flat]))
    write_json(folder.metrics, metrics)
    return metrics


def _save_delta(work: Work, folder: RunFolder, tuner: Tuner, chosen: dict[str, Any]) -> None:
    metadata = work.describe(validation=chosen)
    with torch.no_grad():
        tuner.delta(metadata).save(folder.delta)
