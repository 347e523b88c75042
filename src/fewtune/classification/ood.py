"""A task of ImageNet-1k scored on ImageNet-A, -R and -C.

Nothing is trained or chosen here. A class folder's name is its WordNet id, and so are the task's class names; an
image's label is the output of that name, wherever it stands. On -A and -R only the 200 outputs of their classes
compete (Hendrycks et al. 2021); the accuracy among all outputs is given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.classification.loaded import load_classifier
from fewtune.classification.predict import probabilities
from fewtune.config import Recipe
from fewtune.data.catalog import declaration, find_folder
from fewtune.data.formats.imagenet import CORRUPTIONS, SEVERITIES
from fewtune.data.load import class_split
from fewtune.data.split import Split
from fewtune.data.transforms import eval_transform
from fewtune.errors import ConfigError, DataError, Progress
from fewtune.metrics import wilson
from fewtune.models import Backbone
from fewtune.training.loaders import image_loader, pick_device

ALEXNET_ERRORS = dict(
    zip(
        CORRUPTIONS,
        (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324,
         0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        strict=True,
    )
)  # fmt: skip
"""AlexNet's mean error over the five severities of each corruption, by which the corruption error is normalised
(Hendrycks and Dietterich 2019; figures of their code, github.com/hendrycks/robustness)."""


@dataclass(frozen=True)
class Scorer:
    """A tuned model and how it is fed."""

    model: nn.Module
    transform: Callable[[Any], Any]
    class_names: tuple[str, ...]
    batch_size: int = 32
    workers: int = 0
    accelerator: str = "auto"

    def predict(self, split: Split, text: str) -> tuple[Tensor, Tensor]:
        """Probabilities [N, C] and labels [N]."""
        loader = image_loader(split.with_transform(self.transform), self.batch_size, workers=self.workers)
        return probabilities(self.model, loader, pick_device(self.accelerator), text)


def outputs_of(folders: Sequence[str], class_names: Sequence[str], what: str) -> list[int]:
    """The model's output for each class folder, by name.

    Raises:
        DataError: the model has no output of that name; so it was trained on something else.
    """
    place = {name: output for output, name in enumerate(class_names)}
    unknown = [name for name in folders if name not in place]
    if unknown:
        raise DataError(
            f"{what}: {len(unknown)} of {len(folders)} classes are not among the task's {len(class_names)}, such as "
            f"{unknown[0]}; the task must be of ImageNet-1k, with its WordNet ids as class names"
        )
    return [place[name] for name in folders]


def labelled(folder: Path, root: Path, class_names: Sequence[str], what: str) -> tuple[Split, list[int]]:
    """The images of class folders with the model's outputs as labels, and the outputs that occur."""
    folders, split = class_split(folder, root)
    outputs = outputs_of(folders, class_names, what)
    return replace(split, labels=[outputs[label] for label in split.labels]), outputs


def score_classes(scorer: Scorer, folder: Path, what: str) -> dict[str, Any]:
    """ImageNet-A or -R: accuracy among the outputs of the set's own classes (with Wilson's interval), and
    accuracy among all outputs."""
    split, outputs = labelled(folder, folder, scorer.class_names, what)
    probabilities, labels = scorer.predict(split, what)
    among = torch.tensor(outputs)
    hits = among[probabilities[:, among].argmax(1)] == labels
    interval = wilson(hits.numpy())
    return {
        "images": len(labels),
        "classes": len(outputs),
        "accuracy": {"value": interval.value, "low": interval.low, "high": interval.high, "level": interval.level},
        "accuracy_among_all_outputs": float((probabilities.argmax(1) == labels).float().mean()),
    }


def score_corruptions(scorer: Scorer, folder: Path) -> dict[str, Any]:
    """ImageNet-C: accuracy of each corruption and severity, their mean, and the mean corruption error.

    Hendrycks and Dietterich 2019: CE_c = sum of errors over severities / the same of AlexNet; mCE = mean over c.
    """
    accuracies: dict[str, list[float]] = {}
    for corruption in CORRUPTIONS:
        accuracies[corruption] = []
        for severity in SEVERITIES:
            here = folder / corruption / severity
            if not here.is_dir():
                raise DataError(f"ImageNet-C: {here} is missing; the score needs all 15 corruptions in 5 severities")
            split, _ = labelled(here, folder, scorer.class_names, "ImageNet-C")
            probabilities, labels = scorer.predict(split, f"{corruption} {severity}")
            accuracies[corruption].append(float((probabilities.argmax(1) == labels).float().mean()))
    return {"accuracy": sum(map(sum, accuracies.values())) / 75, "mce": mean_corruption_error(accuracies),
            "corruptions": accuracies}  # fmt: skip


def mean_corruption_error(accuracies: dict[str, list[float]]) -> float:
    """mCE as a fraction (1 is AlexNet's), from the five accuracies of each of the 15 corruptions."""
    each = [(1 - sum(accuracies[name]) / len(accuracies[name])) / ALEXNET_ERRORS[name] for name in CORRUPTIONS]
    return sum(each) / len(each)


def score(scorer: Scorer, key: str, root: str | Path) -> dict[str, Any]:
    """One of the three sets, below `root`.

    Raises:
        DataError: it is not there, or its classes are not the task's.
    """
    data_set = declaration(key)
    folder = find_folder(data_set, root)
    if data_set.format == "corruptions":
        return score_corruptions(scorer, folder)
    if data_set.format == "classes":
        return score_classes(scorer, folder, data_set.title)
    raise DataError(f"{data_set.title} is no set to score a task of ImageNet-1k on; imagenet-a, -r and -c are")


def score_task(
    delta: str | Path,
    keys: Sequence[str],
    root: str | Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """A task file on each of the sets; the file names its backbone, its transform and its classes."""
    for key in keys:
        find_folder(declaration(key), root)
    task = load_classifier(delta, progress)
    scorer = Scorer(task.backbone.model, task.transform, task.class_names, batch_size, workers, accelerator)
    return {key: score(scorer, key, root) for key in keys}


def root_of(data: str) -> str:
    """The root in "task:KEY?root=ROOT"."""
    scheme, _, root = data.partition("?root=")
    if not scheme.startswith("task:") or not root:
        raise ConfigError(f"ood needs a declared data set beside which the sets lie (task:KEY?root=FOLDER), got {data}")
    return root


def check_sets(keys: Sequence[str], data: str) -> None:
    """DataError before any training where a set that will be scored is not there."""
    for key in keys:
        find_folder(declaration(key), root_of(data))


def score_sets(recipe: Recipe, backbone: Backbone, class_names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The sets of a recipe's `ood`, with the model as it was trained."""
    transform = eval_transform(recipe.augment, backbone)
    scorer = Scorer(backbone.model, transform, class_names, recipe.batch_size, recipe.workers, recipe.accelerator)
    return {key: score(scorer, key, root_of(recipe.data)) for key in recipe.ood}
