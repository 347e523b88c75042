"""The settings of a recipe that belong to no method, in groups: data, optimiser, search and machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fewtune.kinds import DEFAULT, KINDS
from fewtune.methods import Settings


class DataKeys(Settings):
    """What is learnt from, and how its images are presented."""

    task: str = Field(
        DEFAULT,
        description="multi-label: images of any number of classes, listed in a CSV file; segmentation: one mask an "
        "image; the model is a segmenter, data has masks; semantic-segmentation: masks of several classes",
    )
    data: str = Field(
        description="a folder of class folders, a CSV file of path,label, wds:SHARDS, hf:NAME?stream, a data set's "
        "name, or task:KEY?root=FOLDER; for segmentation a folder of images/ and masks/"
    )
    shots: int | None = Field(None, gt=0, description="training images of each class, for few-shot learning")
    ood: tuple[Literal["imagenet-a", "imagenet-r", "imagenet-c"], ...] = Field(
        (), description="sets that lie beside ImageNet-1k, on which its task is scored at the end"
    )
    val_fraction: float = Field(0.2, gt=0, lt=1, description="part of the training images kept for validation")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="part kept for the test, if none is given")
    train_on: Literal["train", "train+val"] = Field(
        "train", description="train+val: no image is kept to judge by, so the last epoch is taken instead of the best"
    )
    limit_train: int | None = Field(None, gt=0, description="at most so many images to train and validate on")
    limit_test: int | None = Field(None, gt=0, description="at most so many test images")
    augment: Literal["none", "plain", "flip", "fgvc", "rand"] = Field(
        "plain",
        description="plain: resize only (VTAB); flip: and horizontal flip; fgvc: random resized crop and flip; "
        "rand: the same and RandAugment; none: as evaluated",
    )
    ignore: int = Field(255, ge=0, le=255, description="of masks of several classes: the number of pixels not to count")
    cache: bool = Field(False, description="decode every image once and keep it in memory (augment=plain)")
    image_size: int | None = Field(None, gt=0, description="pixels; left out, the model's own size")
    workers: int = Field(0, ge=0, description="processes that load images; 0: the main one")

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        return KINDS.known(task)

    @field_validator("cache")
    @classmethod
    def _cache_needs_plain(cls, cache: bool, info: ValidationInfo) -> bool:
        if cache and info.data.get("augment", "plain") != "plain":
            raise ValueError("only augment=plain shows the same pixels in every epoch, so nothing else is kept")
        return cache


class OptimiserKeys(Settings):
    """How the chosen parameters are trained."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="torch's optimiser of that name")
    lr: float = Field(1e-3, gt=0, description="learning rate at its peak, after the warm-up")
    head_lr: float | None = Field(None, gt=0, description="learning rate of the head; left out, lr")
    head_init: Literal["random", "probe"] = Field(
        "random",
        description="probe: the head starts as the converged linear probe (Kumar et al. 2022), which is kept where no "
        "epoch is better on validation images",
    )
    weight_decay: float = Field(0.0, ge=0, description="of what is trained; frozen weights never decay")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    epochs: int = Field(100, gt=0, description="passes over the training images")
    stop_after: int | None = Field(
        None, gt=0, description="end after so many of the epochs; the learning rate follows the schedule of them all"
    )
    warmup_epochs: int | None = Field(None, ge=0, description="left out: a tenth of the epochs, at most 10")
    warmup_lr: float = Field(1e-7, ge=0, description="learning rate of the first step")
    min_lr: float = Field(1e-8, ge=0, description="learning rate of the last step")
    batch_size: int = Field(32, gt=0, description="images per process and step")
    accumulate: int = Field(1, gt=0, description="batches whose gradients are added before a step")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; left out, no averaging")
    consistency: float = Field(
        0.0, ge=0, description="weight of the squared change of an image's logits since the last epoch (PACE)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that all classes divide")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: off")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: inverse to class counts")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth in training: how often a block is left out")

    @field_validator("stop_after")
    @classmethod
    def _stops_within(cls, stop: int | None, info: ValidationInfo) -> int | None:
        if stop is not None and stop > info.data.get("epochs", stop):
            raise ValueError(f"must not be larger than epochs, {info.data['epochs']}")
        return stop

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_ends(cls, warmup: int | None, info: ValidationInfo) -> int | None:
        if warmup is not None and warmup >= info.data.get("epochs", warmup + 1):
            raise ValueError(f"must be smaller than epochs, {info.data['epochs']}")
        return warmup

    @property
    def warmup(self) -> int:
        """Warm-up in epochs: as given, else a tenth of all epochs and at most 10 (10 of 100, as published)."""
        return min(10, self.epochs // 10) if self.warmup_epochs is None else self.warmup_epochs


class SearchKeys(Settings):
    """What `--search` tries; every trial is one short run judged on validation images."""

    search_lr: tuple[float, ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2), min_length=1, description="learning rates tried first; then values between the ends"
    )
    search_k: tuple[float, ...] = Field((1.0, 5.0), min_length=1, description="connections per neuron, one of these")
    search_drop_path: tuple[float, ...] = Field((), description="one of these; left out, drop_path is not searched")
    search_epochs: int = Field(5, gt=0, description="epochs of each short run")
    search_trials: int | None = Field(
        None, gt=0, description="short runs; left out, as many as the lists have combinations, or as time allows"
    )
    search_seconds: float | None = Field(None, gt=0, description="no short run begins later; also as --time 20min")

    @field_validator("search_lr", "search_k")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in values):
            raise ValueError("every value must be greater than 0")
        return values

    @field_validator("search_drop_path")
    @classmethod
    def _fractions(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= value < 1 for value in values):
            raise ValueError("every value must lie between 0 and 1")
        return values


class MachineKeys(Settings):
    """Where it runs; passed to Lightning's Trainer as they are."""

    accelerator: str = Field("auto", description="cpu, gpu, mps or another of Lightning's; auto: the fastest here")
    devices: int | str = Field("auto", description="how many of them, each with a process of its own")
    num_nodes: int = Field(1, gt=0, description="machines that train together")
    strategy: str = Field(
        "auto",
        description="how processes share the work: ddp, fsdp2 (each holds its rows of the weights) or "
        "another of Lightning's",
    )
    precision: Literal["32", "16-mixed", "bf16-mixed"] = Field("32", description="of activations; weights stay float32")
    report: bool = Field(True, description="`fewtune fit` writes report.html into the run's folder at its end")
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = Field(
        "none", description="where curves and results go beside TensorBoard, by that library's own settings and login"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of all that is drawn: images, head, order, augmentation")

    @field_validator("strategy")
    @classmethod
    def _no_flat_parameters(cls, strategy: str) -> str:
        if strategy.startswith("fsdp") and strategy != "fsdp2":
            raise ValueError(f"{strategy} flattens weights, so that no connection can be told apart; take fsdp2")
        return strategy

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value
