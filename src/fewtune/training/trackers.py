"""Where a run's curves go beside TensorBoard: Weights & Biases, MLflow or Trackio.

Each is reached by its own settings and login (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...). A resumed run goes on
in the entry that it began; `tracker.json` in the run's folder holds its name there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from fewtune.config import Recipe
from fewtune.errors import MissingExtra
from fewtune.files import Json, read_json, write_json
from fewtune.training.run_folder import RunFolder
from fewtune.training.trainer import is_main

if TYPE_CHECKING:
    import trackio

PROJECT = "fewtune"
"""What the runs stand under: W&B's and Trackio's project, MLflow's experiment."""

L = TypeVar("L", bound=Logger)

FIGURES = ("trained", "percent_of_backbone", "seconds", "peak_memory_bytes", "delta_bytes")
"""Of a finished run, beside what its test measured."""


class TrackioLogger(Logger):
    """Trackio as a logger of Lightning, which has none of its own."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run
        self._experiment: trackio.Run | None = None

    @property
    def name(self) -> str:
        """The project."""
        return PROJECT

    @property
    def version(self) -> str:
        """The run within the project."""
        return self._run

    @property
    @rank_zero_experiment
    def experiment(self) -> trackio.Run:
        """The run of trackio, begun when it is first needed."""
        if self._experiment is None:
            import trackio

            with redirect_stdout(sys.stderr):  # stdout is for results
                self._experiment = trackio.init(PROJECT, name=self._run, resume="allow", embed=False)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Json | Namespace, *args: object, **kwargs: object) -> None:
        """The settings of the run."""
        self.experiment.config.update(dict(params) if isinstance(params, Mapping) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Figures of a step."""
        self.experiment.log(dict(metrics), step=step)

    def end(self) -> None:
        """Waits until all is written; another run of this process begins its own."""
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


@dataclass(frozen=True)
class Tracker(Generic[L]):
    """How one of them is begun and ended.

    library: what must be installed; its extra has the same name.
    begin: (folder, the run's name there, or None for a new one) -> a logger.
    named: the name under which the logger's run is gone on with.
    end: called once nothing more is logged.
    """

    library: str
    begin: Callable[[RunFolder, str | None], L]
    named: Callable[[L], str]
    end: Callable[[L], None]


def _wandb(folder: RunFolder, run: str | None) -> WandbLogger:
    name = run or uuid.uuid4().hex[:8]
    return WandbLogger(name=folder.path.name, project=PROJECT, save_dir=folder.path, id=name, resume="allow")


def _mlflow(folder: RunFolder, run: str | None) -> MLFlowLogger:
    store = os.environ.get("MLFLOW_TRACKING_URI")  # Lightning reads it only once, when it is imported
    if store is None:  # then it is mlruns/, which newer versions of MLflow refuse unless this is set
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return MLFlowLogger(PROJECT, run_name=folder.path.name, run_id=run, tracking_uri=store)


def _trackio(folder: RunFolder, run: str | None) -> TrackioLogger:
    return TrackioLogger(run or f"{folder.path.name}-{uuid.uuid4().hex[:8]}")


def _tracker(name: str) -> Tracker[Any] | None:
    match name:
        case "wandb":
            return Tracker("wandb", _wandb, lambda one: one.version, lambda one: one.experiment.finish())
        case "mlflow":
            return Tracker("mlflow", _mlflow, lambda one: one.run_id, lambda one: one.finalize("success"))
        case "trackio":
            return Tracker("trackio", _trackio, lambda one: one.version, lambda one: one.end())
    return None


def check_tracker(recipe: Recipe) -> None:
    """MissingExtra where the recipe's tracker is not installed."""
    tracker = _tracker(recipe.tracker)
    if tracker is not None and importlib.util.find_spec(tracker.library) is None:
        raise MissingExtra(tracker.library, tracker.library)


def results(metrics: Json) -> dict[str, float]:
    """What a finished run's metrics.json says, as the figures that a tracker shows."""
    test = {f"test_{name}": value["value"] for name, value in metrics.get("test", {}).items() if _is_interval(value)}
    return {**test, **{name: float(metrics[name]) for name in FIGURES if name in metrics}}


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and "value" in value


@contextmanager
def tracked(recipe: Recipe, folder: RunFolder) -> Iterator[list[Logger]]:
    """The logger of the recipe's tracker, with the settings in it; an empty list where none is asked for."""
    tracker = _tracker(recipe.tracker)
    if tracker is None:
        yield []
        return
    known = read_json(folder.tracker)["run"] if folder.tracker.exists() else None
    logger = tracker.begin(folder, known)
    if is_main():
        logger.log_hyperparams(recipe.model_dump(mode="json"))
        write_json(folder.tracker, {"tracker": recipe.tracker, "project": PROJECT, "run": tracker.named(logger)})
    try:
        yield [logger]
    finally:
        if is_main():
            tracker.end(logger)
