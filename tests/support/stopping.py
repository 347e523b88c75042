"""Runs that end in the midst, within one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback


@dataclass
class Stop(Callback):
    """Ends training as Ctrl-C does, at the beginning of an epoch (from 0)."""

    epoch: int

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt
