"""Training in stages: at the beginning of some epochs more of the budget is chosen (`stages=`)."""

from __future__ import annotations

import logging
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.neurons import Places
from fewtune.selection import Selection
from fewtune.training.learner import Learner, kept_state
from fewtune.training.run_folder import RunFolder
from fewtune.training.sharding import Checkpointed
from fewtune.training.trainer import SafeCheckpoints
from fewtune.training.tuners import Share, method_of
from fewtune.training.work import Work
from fewtune.tuning import Tuner
from fewtune.tuning.growing import grow, grow_optimizer, lifted_state, lifted_values

log = logging.getLogger("fewtune")
PLACES = "fewtune_places"
"""What a checkpoint calls the connections whose values it holds."""


def beginnings(recipe: Recipe) -> dict[int, int]:
    """Epoch -> the stage that begins with it, from stage 1 on: evenly over the first half of the epochs."""
    n = recipe.stages
    return {max(stage, stage * recipe.epochs // (2 * n)): stage for stage in range(1, n)}


class Stages(Callback):
    """Lets the selection grow. One for each training; in a run's folder the selection is that of the last stage begun.

    Between stages nothing is different: the schedule, the optimiser and the average go on, and so do the values and the
    optimiser's state of what was chosen before. What was kept of earlier epochs (the best so far, the start) is kept as
    the same model with more connections, the new ones at their pretrained values.
    """

    def __init__(self, work: Work, folder: RunFolder | None = None) -> None:
        self.work, self.folder, self.beginnings = work, folder, beginnings(work.recipe)

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """ConfigError where several processes train."""
        if trainer.world_size > 1:
            raise ConfigError("stages works in one process; take devices=1, or stages=1")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Choose the next part, if a stage begins."""
        stage = self.beginnings.get(trainer.current_epoch)
        if stage is not None:
            assert isinstance(module, Learner)
            self._grow(trainer, module, stage)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Checkpointed) -> None:
        """Which connections the values are of."""
        assert isinstance(module, Learner)
        assert isinstance(module.tuner, Tuner)
        checkpoint[PLACES] = {name: places.flat for name, places in module.tuner.selection.places.items()}

    def _grow(self, trainer: pl.Trainer, module: Learner, stage: int) -> None:
        tuner, method = module.tuner, method_of(self.work)
        assert isinstance(tuner, Tuner)
        assert method.grow is not None
        run, before = Share(self.work, trainer.strategy.root_device), tuner.named_parameters()
        select = partial(method.grow, run, tuner.selection, stage)
        module.tuner, lift = grow(tuner, select, lambda larger: method.attach(run, self._filed(larger)))  # type: ignore[arg-type,return-value]
        grow_optimizer(trainer.optimizers[0], before, module.tuner, lift)
        fresh = kept_state(module.tuner.state_dict())
        if module.average is not None:
            averaged = dict(zip(before, module.average.values, strict=True))
            lifted = lifted_values(averaged, fresh["values"], lift)
            module.average.values = [
                value.to(p.device) for value, p in zip(lifted.values(), module.tuner.parameters(), strict=True)
            ]
        for kept in {id(one["state"]): one["state"] for one in (module.best, module.start) if one}.values():
            kept |= lifted_state(kept, fresh, lift)
        connections = module.tuner.selection.connections
        log.info("stage %d of %d: %s connections", stage + 1, self.work.recipe.stages, f"{connections:,}")

    def _filed(self, selection: Selection) -> Selection:
        """As a resumed run reads it: the optimiser counts parameters by the order of layers, which is the file's."""
        if self.folder is None:
            return selection
        selection.save(self.folder.selection)
        return Selection.load(self.folder.selection)


def rewind(folder: RunFolder) -> None:
    """Brings the folder's selection back to the connections that its checkpoint is of, which may be fewer: a run that
    was killed in the first epoch of a stage goes on from the epoch before."""
    if not folder.checkpoint.exists():
        return
    flat = SafeCheckpoints().load_checkpoint(folder.checkpoint)[PLACES]
    latest = Selection.load(folder.selection)
    views = latest.anatomy.views
    places = {name: Places(views[name].neurons, views[name].fan_in, flat[name]) for name in views if name in flat}
    Selection(latest.anatomy, places, latest.dense).save(folder.selection)
