"""The folder of a run: what lies where, whether a run may start in it, and what it was run with."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewtune.config import Recipe, read_recipe, write_recipe
from fewtune.errors import ConfigError
from fewtune.files import write_json, write_text
from fewtune.stores import address, is_address

LIBRARIES = ("fewtune", "torch", "torchvision", "timm", "lightning", "transformers", "numpy", "scikit-learn")

MAY_DIFFER = {
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "workers",
    "report",
    "tracker",
    "search_trials",
    "search_seconds",
}
"""Settings that a resumed run may have otherwise than the run that it continues."""

SEARCHED = {"lr", "k", "budget", "drop_path"}
"""Settings that a search replaces."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe; it stands there as soon as a run has begun."""
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        """Versions of Python and of the libraries."""
        return self.path / "versions.json"

    @property
    def selection(self) -> Path:
        """The chosen connections (method gps)."""
        return self.path / "selection.safetensors"

    @property
    def checkpoint(self) -> Path:
        """What `--resume` goes on from: compact, after the last finished epoch."""
        return self.path / "checkpoint.ckpt"

    @property
    def history(self) -> Path:
        """One line an epoch; also as JSON beside it."""
        return self.path / "history.csv"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def tracker(self) -> Path:
        """Which tracker the run is in, and its name there."""
        return self.path / "tracker.json"

    @property
    def search(self) -> Path:
        """What a search tried."""
        return self.path / "search.csv"

    @property
    def study(self) -> Path:
        """The search's trials, an Optuna study."""
        return self.path / "search.db"

    @property
    def unsearched(self) -> Path:
        """The recipe with which a search was begun; `config` holds the one with what it chose."""
        return self.path / "search.yaml"

    @property
    def delta(self) -> Path:
        """The task file."""
        return self.path / "delta.safetensors"

    @property
    def metrics(self) -> Path:
        """The run's result; it stands there when a run is complete. Its plain numbers also as CSV."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Probabilities of every test image."""
        return self.path / "test_predictions.csv"

    @property
    def curves(self) -> Path:
        """Loss, accuracy and learning rate over the epochs."""
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        """The page for a reader."""
        return self.path / "report.html"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """ConfigError where a run may not start here; nothing is changed."""
        if resume and overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite throws it away; give one of them")
        if is_address(self.path):
            raise ConfigError(
                f"{address(self.path)} is in an object store, and a run is written into a folder of this machine; only "
                "grids are written into stores (fewtune bench run --out)"
            )
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, expected a folder to write the run into")
        used = self.path.is_dir() and any(self.path.iterdir())
        if used and not resume and not overwrite:
            raise ConfigError(f"{self.path} is not empty; choose another --out, or give --resume or --overwrite")
        if used and not self.config.exists() and not self.unsearched.exists():
            if overwrite:
                raise ConfigError(f"{self.path} holds no run of fewtune, so nothing in it is overwritten")
            raise ConfigError(f"{self.path} holds no run to resume: there is no {self.config.name} in it")

    def begin_search(self, recipe: Recipe) -> None:
        """Throw an earlier run's files away and write what a search begins with."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._clear()
        self.config.unlink(missing_ok=True)
        write_text(self.unsearched, write_recipe(recipe))

    def begin(self, recipe: Recipe, *, searched: bool = False) -> None:
        """Throw an earlier run's files away, but for the search that chose `recipe`, and write what is known before
        any work."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not searched:
            self._clear()
        write_json(self.versions, versions())
        write_text(self.config, write_recipe(recipe))

    def _clear(self) -> None:
        for old in (self.metrics, self.checkpoint, self.selection, self.delta, self.predictions, self.curves,
                    self.history, self.history.with_suffix(".json"), self.metrics.with_suffix(".csv"),
                    self.report, self.tracker, self.search, self.study, self.unsearched):  # fmt: skip
            old.unlink(missing_ok=True)
        for events in self.tensorboard.glob("events.*"):
            events.unlink()

    def abandon(self) -> None:
        """Take away what was written at the beginning, where nothing was learnt since: the next try may start here."""
        if any(path.exists() for path in (self.checkpoint, self.delta, self.metrics)):
            return
        for path in (self.config, self.versions, self.selection, self.unsearched, self.study, self.tracker):
            path.unlink(missing_ok=True)
        for events in self.tensorboard.glob("*"):
            events.unlink()
        for path in (self.tensorboard, self.path):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def resumed(self, recipe: Recipe | None, *, searched: bool = False) -> Recipe:
        """The recipe of the run that lies here; ConfigError where `recipe` asks for another one."""
        saved = read_recipe([self.config if self.config.exists() else self.unsearched])
        if recipe is None:
            return saved
        free = MAY_DIFFER | (SEARCHED if searched else set())
        now = recipe.model_dump()
        other = [key for key, value in saved.model_dump().items() if key not in free and now[key] != value]
        if other:
            details = ", ".join(f"{key} was {getattr(saved, key)!r} and is {now[key]!r}" for key in other)
            raise ConfigError(f"{self.path} was begun with other settings, so it cannot be resumed: {details}")
        return saved.changed(**{key: now[key] for key in MAY_DIFFER})


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the libraries that are installed."""
    versions = {"python": platform.python_version(), "platform": platform.platform(), "command": shlex.join(sys.argv)}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss, what validation measured and learning rate over the epochs, as a PNG."""
    import io

    from matplotlib.figure import Figure

    from fewtune.files import write_bytes

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    epochs = [entry["epoch"] + 1 for entry in history]
    measures = tuple(key for key in history[0] if key.startswith("val_") and key != "val_loss")
    title = f"validation {measures[0].removeprefix('val_')}" if measures else "no validation"
    panels = {"loss": ("train_loss", "val_loss"), title: measures, "learning rate": ("lr",)}
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in [key for key in keys if key in history[0]]:
            axes.plot(epochs, [entry[key] for entry in history], marker=".", label=key)
        axes.set(title=title, xlabel="epoch")
        if len(keys) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())
