"""Reading finished runs for a report, from their files alone."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fewtune.data import ImageData, load_data
from fewtune.errors import ConfigError, FewtuneError
from fewtune.selection import Selection

Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it.

    Attributes:
        name: how the report calls it.
        path: its folder.
        recipe: its resolved settings.
        metrics: what stands in metrics.json.
        history: one entry an epoch; empty for methods without epochs.
        versions: of Python and the libraries, with the command.
        rows: one row for every test image; empty where there was no test set.
    """

    name: str
    path: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    versions: dict[str, str]
    rows: list[Row]

    @property
    def draws_masks(self) -> bool:
        """Whether its test images were scored by masks and not by classes."""
        return bool(self.rows) and "dice" in self.rows[0]

    @property
    def multi_label(self) -> bool:
        """Whether its test images may have any number of classes."""
        return bool(self.rows) and "labels" in self.rows[0]

    @property
    def class_masks(self) -> bool:
        """Whether its masks are of several classes."""
        return self.draws_masks and "accuracy" in self.rows[0]

    @property
    def measure(self) -> str:
        """The measure that its one-sentence result states, a mean over images: a key of metrics["test"]."""
        if self.multi_label:
            return "f1_images"
        return "dice" if self.draws_masks else "accuracy"

    @cached_property
    def selection(self) -> Selection | None:
        """The chosen connections; None for methods that choose none."""
        path = self.path / "selection.safetensors"
        try:
            return Selection.load(path) if path.exists() else None
        except FewtuneError:  # what another method found in the training images, such as SPT's plan
            return None

    @property
    def drawn_by(self) -> dict[str, Any]:
        """The settings by which its images were split."""
        keys = ("seed", "val_fraction", "test_fraction", "limit_train", "limit_test")
        return {key: self.recipe[key] for key in keys if key in self.recipe}

    @cached_property
    def images(self) -> ImageData:
        """A classification run's images in the same splits as it had; listed once.

        Raises:
            DataError: the images are no longer there.
        """
        return load_data(self.recipe["data"], **self.drawn_by, shots=self.recipe.get("shots"))

    def scores(self) -> dict[str, float]:
        """What each test image contributes to the measure: Dice, F1, or 1 where its class is right; by file name."""
        if self.multi_label:
            return {row["file"]: float(row["f1"]) for row in self.rows}
        if self.draws_masks:
            return {row["file"]: float(row["dice"]) for row in self.rows}
        return {row["file"]: float(row["label"] == row["prediction"]) for row in self.rows}

    def confidences(self) -> tuple[np.ndarray, np.ndarray]:
        """The probability of each test image's predicted class, and 1 where it is right; [images] each."""
        return (
            np.array([float(row["probability"]) for row in self.rows]),
            np.array([float(row["label"] == row["prediction"]) for row in self.rows]),
        )


def read_run(path: Path, name: str | None = None) -> Run:
    """Reads the folder of a finished run.

    Raises:
        ConfigError: there is no such folder, it holds no run of fewtune, or its run is not finished.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; expected the folder of a run, as `fewtune fit --out` writes it")
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} holds no run of fewtune: there is no config.yaml in it")
    if not (path / "metrics.json").exists():
        raise ConfigError(f"the run in {path} is not finished; go on with it: fewtune fit --out {path} --resume")
    try:
        recipe = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        metrics = _json(path / "metrics.json", {})
        history = _json(path / "history.json", [])
        versions = _json(path / "versions.json", {})
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"a file of the run in {path} is damaged: {' '.join(str(error).split())}") from error
    return Run(name or path.name, path, recipe, metrics, history, versions, _rows(path / "test_predictions.csv"))


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads several runs; those whose folders have the same name are called by what else tells their paths apart.

    Raises:
        ConfigError: as `read_run`, or a folder is given twice.
    """
    folders = [path.resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is given twice; give each folder once")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = told_apart(folders)
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def told_apart(folders: Sequence[Path]) -> list[str]:
    """Paths without the folders at their beginning, and those at their end, that all of them share."""
    shared = Path(os.path.commonpath([folder.parent for folder in folders]))
    parts = [folder.relative_to(shared).parts for folder in folders]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else absent


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
