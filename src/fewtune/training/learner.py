"""The Lightning module of every method and task: schedule, averaging, validation, and a compact state."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fewtune.config import Recipe
from fewtune.errors import ConfigError, FewtuneError
from fewtune.methods.base import State, Tuner
from fewtune.methods.reach import Border, find_border
from fewtune.training.consistency import Consistency
from fewtune.training.ema import Average
from fewtune.training.images import Images, Labelled, Sample
from fewtune.training.kept import KeptPrefix
from fewtune.training.loaders import SeededImages, keyed_loader, seed_all
from fewtune.training.schedule import optimizer_of, schedule
from fewtune.training.sharding import Checkpointed, FullySharded, shared_out, whole

SHOWN_FILES = 8
BEFORE = -1
"""The "epoch" of the state in which training began."""


class NonFiniteLoss(FewtuneError):
    """The loss became infinite or not a number."""


class Learner(pl.LightningModule):
    """Trains what a tuner trains, and knows nothing of how it was chosen. A task adds its loss and its measure.

    `attach(module)` is called once the processes are connected and gives the tuner: an object with `parameters()`,
    `param_groups(lr=, head_lr=)`, `state_dict()`, `load_state_dict()` and `sync()`. `train` and `val` are splits with
    their transforms; without `val` the last epoch is the best. The module's state is the tuner's (compact), so
    checkpoints hold no frozen weight.
    """

    measure: ClassVar[str]
    """The name of what `judged` gives an image beside its loss; its mean, the larger the better, chooses the epoch."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train: Images,
        val: Images | None,
        attach: Callable[[Learner], Tuner],
    ) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.splits = {"train": train, "val": val}
        self.attach = attach
        self.tuner: Tuner
        self.average: Average | None = None
        self.kept: KeptPrefix | None = None
        self.consistency = Consistency(recipe.consistency, len(train)) if recipe.consistency else None
        self.logits: Tensor
        """Of the latest training batch, [B, C], where a task's loss has some."""
        self.best: dict[str, Any] | None = None
        self.start: dict[str, Any] | None = None
        """Where training began, when that is a result of its own: its name, state and validation."""
        self.history: list[dict[str, float]] = []
        self.earlier = 0.0
        """Seconds of the parts of a run that this one goes on from."""
        self._begun = time.perf_counter()
        self._scores: dict[str, float] = {}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._train_loss: list[Tensor] = []
        self._averaged = ExitStack()

    # -- what a task adds

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of a batch of training images."""

    @abstractmethod
    def judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and measure of every image of a validation batch, [B] each (the measure: [B, …], see `overall`)."""

    def overall(self, loss: Tensor, measured: Tensor) -> tuple[float, float]:
        """Loss and measure of all validation images together, from what `judged` gave of each: their means.

        Args:
            loss: [N].
            measured: [N], or [N, …] where a task's measure is more than a mean over images.
        """
        mean_loss, mean = torch.stack([loss, measured], dim=1).mean(dim=0).tolist()
        return mean_loss, mean

    # -- set-up

    def setup(self, stage: str) -> None:
        """Attach the tuner, unless that is done; the start of training is the first that can be the best."""
        border = None if self.recipe.reach is None else find_border(self.model, self.recipe.reach)
        if border is not None and self.recipe.keep_prefix != "none" and self.kept is None:
            self.kept = self._keep(border)  # first: where it is too much, nothing has been selected in vain
        if not hasattr(self, "tuner"):
            self.tuner = self.attach(self)
            if self.start is not None:
                self.start["state"] = kept_state(self.tuner.state_dict())
                if self.splits["val"] is not None:
                    self.best = {"epoch": BEFORE, "state": self.start["state"], **self.start["validation"]}
        self.model.train()  # Lightning would leave a model that comes in evaluation mode in it
        for module in border.below.values() if border is not None else ():
            module.eval()  # what is frozen is not disturbed by dropout either

    def configure_model(self) -> None:
        """Shard what is attached, where the strategy shards; averages are of what a process holds after that."""
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self.model)
        if self.recipe.ema is not None and self.average is None:
            self.average = Average(self.tuner, self.recipe.ema)

    @property
    def sharded(self) -> bool:
        """Whether each process holds rows of the weights only."""
        return isinstance(self.trainer.strategy, FullySharded)

    def _keep(self, border: Border) -> KeptPrefix:
        """What lies below the border, computed once for each image."""
        if self.trainer.world_size > 1:
            raise ConfigError("keep_prefix works in one process; take devices=1, or keep_prefix=none")
        self.model.to(self.trainer.strategy.root_device)
        with self.trainer.precision_plugin.forward_context():
            return KeptPrefix.of(self.model, border, self.recipe, cast("dict[str, Labelled | None]", self.splits))

    def outputs(self, images: Tensor) -> object:
        """What the model returns for a batch: of images, or of what is kept of them."""
        return self.model(images) if self.kept is None else self.kept.outputs(images)

    def _split(self, which: str) -> Images:
        split = self.splits[which]
        assert split is not None
        return split

    def _loader(self, which: str, shuffle: bool) -> DataLoader[Sample]:
        items = SeededImages(self._split(which), self.recipe.seed) if self.kept is None else self.kept.images[which]
        return keyed_loader(
            items,
            self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=self.trainer.current_epoch if shuffle else 0,
            shuffle=shuffle,
            workers=self.recipe.workers,
            world=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """This process's share of the training images."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """This process's share of the validation images."""
        return self._loader("val", shuffle=False)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimiser over the tuner's groups, and a learning rate for every step."""
        groups = self.tuner.param_groups(lr=self.recipe.lr, head_lr=self.recipe.head_lr)
        epochs = self.recipe.stop_after or self.recipe.epochs
        steps = int(self.trainer.estimated_stepping_batches) * self.recipe.epochs // epochs
        optimizer = optimizer_of(self.recipe, groups)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule(self.recipe, optimizer, steps), "interval": "step"},
        }

    # -- training

    def on_train_epoch_start(self) -> None:
        """Dropout, drop path and mixing of an epoch draw from its own seed, so a resumed run draws the same."""
        seed_all(self.recipe.seed, self.current_epoch, self.trainer.global_rank)
        self._train_loss = []
        self._started = time.perf_counter()

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, labels, indices = batch
        loss = self.loss(images, labels)
        if self.consistency is not None:
            loss = loss + self.consistency.penalty(self.logits, indices)
        self._must_be_finite(loss, "train", indices)
        self._train_loss.append(loss.detach())
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], object] | None = None,
    ) -> None:
        """One step, then one of the average."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.average is not None:
            self.average.update(self.tuner)

    def on_train_epoch_end(self) -> None:
        """One line of the history; where no image is kept for validation, the latest epoch is the one to keep."""
        if self.consistency is not None:
            self.consistency.end_epoch(self._everyones)
        entry = {
            "epoch": self.current_epoch,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": float(self._everyones(torch.stack(self._train_loss)).mean()),
            **{f"val_{key}": value for key, value in self._scores.items()},
            "seconds": time.perf_counter() - self._started,
        }
        if self.splits["val"] is None:
            with self.average.in_place_of(self.tuner) if self.average else nullcontext():
                self.best = {"epoch": self.current_epoch, "state": kept_state(self.tuner.state_dict())}
        self.history.append(entry)
        self.log_dict({key: float(value) for key, value in entry.items() if key != "epoch"}, rank_zero_only=True)

    def _must_be_finite(self, loss: Tensor, which: str, indices: Tensor) -> None:
        if torch.isfinite(loss):
            return
        names = [str(self._split(which).names[i]) for i in indices.tolist()]
        shown = ", ".join(names[:SHOWN_FILES]) + (f" and {len(names) - SHOWN_FILES} more" if len(names) > 8 else "")
        kept = f"the state after epoch {self.history[-1]['epoch']} is kept" if self.history else "nothing was learnt"
        raise NonFiniteLoss(
            f"the loss became {loss.item()} in epoch {self.current_epoch} on the images {shown}; {kept}; "
            f"try a smaller lr than {self.recipe.lr:g}, a clip, or precision=32, and look at these images"
        )

    # -- validation

    def on_validation_epoch_start(self) -> None:
        """Where weights are averaged, the averaged ones are judged and kept."""
        self._seen = []
        if self.average is not None:
            self._averaged.enter_context(self.average.in_place_of(self.tuner))

    def validation_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        """Keep loss and measure of every image, with its index."""
        images, labels, indices = batch
        loss, measured = self.judged(images, labels)
        self._must_be_finite(loss.sum(), "val", indices)
        self._seen.append((indices, loss, measured))

    def on_validation_epoch_end(self) -> None:
        """Of all processes' images, each counted once; keep the best epoch, of equals that with the lower loss."""
        columns = [torch.cat(column) for column in zip(*self._seen, strict=True)]
        indices, loss, measured = (self._everyones(column) for column in columns)
        ordered = [torch.zeros(len(self._split("val")), *column.shape[1:]) for column in (loss, measured)]
        ordered[0][indices], ordered[1][indices] = loss, measured
        mean_loss, mean = self.overall(*ordered)
        self._scores = {"loss": mean_loss, self.measure: mean}
        if self.best is None or (mean, -mean_loss) > (self.best[self.measure], -self.best["loss"]):
            self.best = {"epoch": self.current_epoch, "state": kept_state(self.tuner.state_dict()), **self._scores}
        self._averaged.close()
        self.log(self.measure, mean, prog_bar=True, logger=False, rank_zero_only=True)

    def _everyones(self, values: Tensor) -> Tensor:
        """Equally many values [N, …] of all processes, [processes * N, …], on the CPU."""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered.reshape(-1, *values.shape[1:]).cpu()

    # -- state

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, dict[str, Tensor]]:  # type: ignore[override]
        """What is trained, and nothing that is frozen."""
        return self.tuner.state_dict()

    def load_state_dict(self, state: State, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Go on from a compact state, which is whole."""
        self.tuner.load_state_dict(shared_out(state, self.tuner.state_dict()) if self.sharded else state)

    def on_save_checkpoint(self, checkpoint: Checkpointed) -> None:
        """Average, best-so-far and history: plain tensors, dicts, lists and numbers."""
        average = None if self.average is None else whole(self.average.state_dict())
        seconds = self.earlier + time.perf_counter() - self._begun
        if self.consistency is not None:
            checkpoint["consistency"] = self.consistency.state_dict()
        checkpoint["fewtune"] = {
            "average": average, "best": self.best, "start": self.start, "history": self.history, "seconds": seconds,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: Checkpointed) -> None:
        """The counterpart of `on_save_checkpoint`."""
        saved = checkpoint["fewtune"]
        self.best, self.start, self.history = saved["best"], saved.get("start"), saved["history"]
        self.earlier = saved.get("seconds", sum(entry["seconds"] for entry in self.history))
        if self.average is not None:
            self.average.load_state_dict(shared_out(saved["average"], self.average.state_dict()))
        if self.consistency is not None:
            self.consistency.load_state_dict(checkpoint["consistency"])

    def load_best(self) -> None:
        """Put the best epoch's values into the model."""
        assert self.best is not None
        self.load_state_dict(self.best["state"])


def kept_state(state: State) -> dict[str, dict[str, Tensor]]:
    """A copy of a tuner's state on the CPU, whole."""
    return {
        group: {name: whole(tensor.detach()).cpu().clone() for name, tensor in tensors.items()}
        for group, tensors in state.items()
    }
