"""A prepared run of classification: labelled images with their transforms, and a backbone with a new head."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fewtune.classification.evaluate import read_hits
from fewtune.classification.learner import Classifier, training_loss
from fewtune.classification.metrics import report
from fewtune.classification.ood import check_sets, score_sets
from fewtune.classification.predict import prediction_rows, probabilities
from fewtune.config import Recipe
from fewtune.data import ImageData, Split, eval_transform, load_data, train_transform
from fewtune.data.transforms import TwoViews, two_views
from fewtune.errors import ConfigError, DataError
from fewtune.files import write_csv
from fewtune.methods import Tuner
from fewtune.methods.linear import probe_head
from fewtune.metrics import paired_bootstrap, wilson
from fewtune.models import Backbone, channels_last, check_name, load_backbone
from fewtune.objectives import CrossEntropy, Objective, SupCon
from fewtune.training.images import Images
from fewtune.training.learner import Learner
from fewtune.training.loaders import image_loader, pick_device
from fewtune.training.memory import recompute_activations
from fewtune.training.run_folder import RunFolder
from fewtune.training.tuners import Share
from fewtune.training.work import DECODED_FIRST, Start, Work, division

log = logging.getLogger("fewtune")


@dataclass(frozen=True)
class ImageWork(Work):
    """Classification: labelled images with their transforms, and the backbone with a fresh head."""

    data: ImageData
    backbone: Backbone
    learner_class: ClassVar[type[Learner]] = Classifier

    @property
    def train(self) -> Split:
        """Training images as the recipe shows them, or under the user's own transform."""
        usual = train_transform(self.recipe.augment, self.backbone)
        return self.data.train.with_transform(self.train_transform or usual)

    def evaluated(self, split: Images) -> Split:
        """Images of a split as they are evaluated."""
        assert isinstance(split, Split)
        return split.with_transform(eval_transform(self.recipe.augment, self.backbone))

    def learner(self, attach: Callable[[Learner], Tuner]) -> Learner:
        """Trains on the training images, judges on the validation images, where there are some."""
        val = None if self.data.val is None else self.evaluated(self.data.val)
        return Classifier(self.backbone.model, self.recipe, self.train, val, self.data.num_classes, attach)

    @property
    def scored(self) -> Split:
        """Training images in two views each, which the contrastive loss contrasts."""
        transform: Any = self.train_transform
        return self.data.train.with_transform(TwoViews(transform) if transform else two_views(self.backbone))

    @property
    def objective(self) -> Objective:
        """The supervised contrastive loss, or cross-entropy through the new head, or the user's own."""
        if self.importance_objective is not None:
            return self.importance_objective
        return SupCon(self.recipe.temperature) if self.recipe.objective == "supcon" else CrossEntropy()

    @property
    def loss(self) -> Objective:
        """Cross-entropy."""
        return training_loss(self.recipe, self.data.train.labels, self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The data's."""
        return self.data.class_names

    def renewed(self, recipe: Recipe) -> ImageWork:
        """The same images with another fresh backbone."""
        return replace(self, recipe=recipe, backbone=fresh_backbone(recipe, self.data))

    def untested(self) -> ImageWork:
        """Without the test images."""
        return replace(self, data=replace(self.data, test=None))

    def start(self) -> Start | None:
        """The converged linear probe, where the recipe begins from it."""
        if self.recipe.head_init == "random":
            return None
        log.info("fitting the linear probe that the head starts from")
        probe = probe_head(Share(self, pick_device(self.recipe.accelerator)))
        judged = probe.validation
        if judged:
            log.info("the linear probe is right on %.1f %% of the validation images", 100 * judged["accuracy"])
        return Start("linear probe", judged)

    def test_start(self, folder: RunFolder) -> dict[str, Any]:
        """Accuracy of the model as training began, and what tuning has brought: the difference on the same images."""
        test = self.data.test
        if test is None:
            return {}
        probabilities, labels = self.predicted(test)
        tuned = read_hits(folder.predictions)
        before = (probabilities.argmax(1) == labels).numpy()
        now = np.array([tuned[str(name)] for name in test.names])
        return {"accuracy": asdict(wilson(before)), "gain": asdict(paired_bootstrap(before, now))}

    def test(self, folder: RunFolder) -> dict[str, Any]:
        """Report and predictions of the test images; scores on sets beside ImageNet-1k where the recipe asks for it."""
        metrics: dict[str, Any] = {}
        test, names = self.data.test, self.data.class_names
        if test is not None:
            begun = time.perf_counter()
            probabilities, labels = self.predicted(test)
            metrics["test_seconds"] = time.perf_counter() - begun
            metrics["test"] = report(probabilities, labels, names).to_json()
            write_csv(folder.predictions, prediction_rows(test.names, probabilities, names, test.labels))
        if self.recipe.ood:
            metrics["ood"] = score_sets(self.recipe, self.backbone, names)
        return metrics

    def predicted(self, split: Split, text: str = "test", **options: Any) -> tuple[Tensor, Tensor]:
        """Probabilities [N, C] and labels of a split's images by the model as it is; see `probabilities`."""
        loader = image_loader(self.evaluated(split), self.recipe.batch_size, workers=self.recipe.workers)
        return probabilities(self.backbone.model, loader, pick_device(self.recipe.accelerator), text, **options)


def data_of(recipe: Recipe) -> ImageData:
    """The images that a recipe names, listed and not opened."""
    return load_data(recipe.data, **division(recipe), shots=recipe.shots, progress=log.info)


def prepare(recipe: Recipe) -> ImageWork:
    """Load and check data and backbone; DataError or ModelError where they are not what a recipe needs."""
    return ImageWork(recipe, **checked(recipe, ImageData.require_one_class))


def checked(recipe: Recipe, suits: Callable[[ImageData], None]) -> dict[str, Any]:
    """The data, as it lies on disk too, and the backbone of a recipe; `suits` refuses labels of another kind."""
    check_name(recipe.model)
    if recipe.ood:
        check_sets(recipe.ood, recipe.data)
    data = data_of(recipe)
    suits(data)
    if data.val is None:
        raise DataError(f"{data.name} has too few training images to split validation images off")
    if recipe.train_on == "train+val":
        data = replace(data, train=data.train.joined(data.val), val=None)
    # A damaged image ends a long run at its first epoch; of a large set that is found by `fewtune data check`.
    data.check(decode=sum(map(len, data.splits.values())) <= DECODED_FIRST)
    log.info("%s", data.summary())
    backbone, listed = fresh_backbone(recipe, data), data
    if recipe.cache:
        size, how = backbone.image_size, backbone.interpolation
        kept: dict[str, Any] = {
            name: split.cached(size, square=True, interpolation=how) for name, split in data.splits.items()
        }
        data = replace(data, **kept)
    return {"data": data, "backbone": backbone, "listed": listed}


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
        quantise=recipe.quantise,
        progress=log.info,
    )
    _refuse_cut_patches(backbone)
    channels_last(backbone.model)
    if recipe.checkpoint_activations:
        recompute_activations(backbone.model, recipe.model)
    return backbone


def _refuse_cut_patches(backbone: Backbone) -> None:
    """ConfigError where the patches of a ViT do not cover its input: what lies beyond the last one is never seen."""
    embedding = getattr(backbone.model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    size, cut = backbone.image_size, backbone.image_size % patch[0]
    if cut:
        raise ConfigError(
            f"image_size={size} is no multiple of the model's patches of {patch[0]} px; take {size - cut} or "
            f"{size - cut + patch[0]}"
        )
