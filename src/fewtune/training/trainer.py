"""The one place that builds a Lightning Trainer, and the few callbacks that it carries."""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from fewtune.config import Recipe
from fewtune.errors import FewtuneError
from fewtune.files import csv_text, write_bytes, write_json, write_text
from fewtune.progress import duration
from fewtune.training.learner import Learner
from fewtune.training.precision import attention_in_batches
from fewtune.training.sharding import Checkpointed

log = logging.getLogger("fewtune")
TIMED_STEPS = slice(1, 4)  # the first step warms caches up


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and are read without unpickling any code."""

    def save_checkpoint(self, checkpoint: Checkpointed, path: str | Path, storage_options: object = None) -> None:
        """Write to a file beside `path`, then move it into place."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getvalue())

    def load_checkpoint(  # type: ignore[override]
        self, path: str | Path, map_location: str | torch.device | None = "cpu", weights_only: bool | None = True
    ) -> Checkpointed:
        """Tensors, dicts, lists and numbers only."""
        loaded: Checkpointed = torch.load(path, map_location=map_location, weights_only=True)
        return loaded


class SaveEpochs(Checkpoint):
    """After every epoch: the checkpoint to resume from, and the history as CSV and JSON."""

    def __init__(self, checkpoint: Path, history: Path) -> None:
        self.checkpoint, self.history = checkpoint, history

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Runs after the module has added its line to the history."""
        assert isinstance(module, Learner)
        trainer.save_checkpoint(self.checkpoint)
        if trainer.is_global_zero:
            write_text(self.history.with_suffix(".csv"), csv_text(module.history))
            write_json(self.history.with_suffix(".json"), module.history)


class EpochBar(RichProgressBar):
    """A bar that counts epochs from 1, as the lines of the log do, and lets lines stand above itself."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1} of {self.trainer.max_epochs}"

    def say(self, text: str) -> None:
        """Print a line of its own above the bar."""
        if self.progress is None:
            log.info("%s", text)
        else:
            self.progress.console.print(text, highlight=False)


class TimeEstimate(Callback):
    """Says after a few steps about how long the run will take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        """Stop it, and speak once."""
        self.seconds.append(time.perf_counter() - self.started)
        timed = self.seconds[TIMED_STEPS]
        if len(self.seconds) == TIMED_STEPS.stop and trainer.is_global_zero:
            epochs = (trainer.max_epochs or 0) - trainer.current_epoch
            steps = epochs * trainer.num_training_batches
            seconds = steps * sum(timed) / len(timed)
            text = f"about {duration(seconds)} for {steps} steps and {epochs} epochs in all"
            bar = trainer.progress_bar_callback
            bar.say(text) if isinstance(bar, EpochBar) else log.info("%s", text)


class EpochLines(Checkpoint):
    """One line an epoch where no terminal shows a progress bar. A Checkpoint, since these run after the module has
    added its line to the history."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What chooses the epoch, and the loss; where nothing is kept for validation, the training loss."""
        if trainer.is_global_zero and isinstance(module, Learner):
            last, number = module.history[-1], f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            name, key = module.measure, f"val_{module.measure}"
            if key in last:
                log.info("%s: validation %s %.4f, loss %.4f", number, name, last[key], last["val_loss"])
            else:
                log.info("%s: training loss %.4f", number, last["train_loss"])


def build_trainer(
    recipe: Recipe, folder: Path, *, callbacks: list[Callback], logger: Sequence[Logger] = (), quiet: bool = False
) -> pl.Trainer:
    """The Trainer of a recipe; accelerator, devices, nodes, strategy and precision go to Lightning as they are."""
    quiet_lightning()
    terminal = sys.stderr.isatty() and not quiet
    shown: list[Callback] = [] if quiet else [TimeEstimate(), EpochLines()]
    if terminal:
        shown = [TimeEstimate(), EpochBar(console_kwargs={"stderr": True})]
    return pl.Trainer(
        accelerator=recipe.accelerator,
        devices=recipe.devices,
        num_nodes=recipe.num_nodes,
        strategy=recipe.strategy,
        precision=recipe.precision if recipe.precision != "32" else "32-true",
        max_epochs=recipe.stop_after or recipe.epochs,
        limit_val_batches=None if recipe.train_on == "train" else 0,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip,
        callbacks=[*callbacks, *shown],
        plugins=[SafeCheckpoints()],
        logger=list(logger) or False,
        log_every_n_steps=1,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loaders deal out their own shares
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )


def run_trainer(trainer: pl.Trainer, module: Learner, recipe: Recipe, checkpoint: Path | None = None) -> None:
    """Train, from `checkpoint` where it is given. Lightning keeps Ctrl-C to itself; here it is raised."""
    try:
        with attention_in_batches(recipe):
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt


class ProcessLost(FewtuneError):
    """Another process of the run has ended, so that this one cannot go on."""


def lost_connection(error: RuntimeError) -> bool:
    """Whether an error is that of a collective operation whose other side is gone (Gloo raises no class of its own)."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def is_main() -> bool:
    """Whether this process is the one that writes and prints; before the processes are connected too."""
    return getattr(rank_zero_only, "rank", 0) == 0


def quiet_lightning() -> None:
    """Lightning's hints about workers and hardware are not about the user's work."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode.*")  # frozen statistics are in it by design
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # every process logs the same numbers
    warnings.filterwarnings("ignore", module="lightning.*", category=FutureWarning)
