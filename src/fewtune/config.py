"""The recipe of a run: every setting of `fewtune fit`, checked before any work begins.

A recipe is flat, so that a YAML file and `key=value` on the command line read alike. All mistakes are reported
at once, and an unknown key names its nearest known one. The defaults are the paper's recipe for classification
(Adam, no weight decay, 100 epochs, linear warm-up over 10, cosine to 1e-8).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fewtune.errors import ConfigError


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataKeys(_Keys):
    """What is learnt from, and how its images are presented."""

    task: Literal["classification", "segmentation"] = Field(
        "classification", description="segmentation: one mask an image; the model is a segmenter, data has masks"
    )
    data: str = Field(
        description="a folder of class folders, a CSV file of path,label, a data set's name, or task:KEY?root=FOLDER; "
        "for segmentation a folder of images/ and masks/"
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
    augment: Literal["none", "plain", "flip", "fgvc"] = Field(
        "plain",
        description="plain: resize only (VTAB); flip: and horizontal flip; fgvc: random resized crop and flip; "
        "none: as evaluated",
    )
    cache: bool = Field(False, description="decode every image once and keep it in memory (augment=plain)")
    image_size: int | None = Field(None, gt=0, description="pixels; left out, the model's own size")
    workers: int = Field(0, ge=0, description="processes that load images; 0: the main one")

    @field_validator("cache")
    @classmethod
    def _cache_needs_plain(cls, cache: bool, info: ValidationInfo) -> bool:
        if cache and info.data.get("augment", "plain") != "plain":
            raise ValueError("only augment=plain shows the same pixels in every epoch, so nothing else is kept")
        return cache


class SelectionKeys(_Keys):
    """Which connections are trained (method gps)."""

    selection: str | None = Field(None, description="a file of `fewtune select`; nothing is selected anew")
    k: float | None = Field(None, gt=0, description="connections per neuron; 1 where no budget is given")
    budget: float | None = Field(None, gt=0, le=1, description="selected fraction of the backbone's weights")
    granularity: Literal["neuron", "layer", "network"] = "neuron"
    importance: Literal["gradient", "magnitude", "random", "oracle"] = "gradient"
    oracle: str | None = Field(None, description="for importance=oracle: run folder or task file of a method=full run")
    objective: Literal["supcon", "cross_entropy", "segmentation"] | None = Field(
        None, description="left out: supcon; of segmentation, always its own loss"
    )
    temperature: float = Field(0.07, gt=0, description="of the supervised contrastive loss")
    bias: Literal["all", "none"] = "all"
    scale: Literal["all", "none"] = "all"
    norm: Literal["none", "all"] = "none"
    relative_position: Literal["none", "all"] = "none"
    exclude: tuple[str, ...] = Field((), description="glob patterns of modules that are never selected from")

    @field_validator("objective")
    @classmethod
    def _of_the_task(cls, objective: str | None, info: ValidationInfo) -> str:
        masks = info.data.get("task") == "segmentation"
        if objective is not None and masks != (objective == "segmentation"):
            raise ValueError(f"{objective} is no objective of {info.data.get('task')}")
        return "segmentation" if masks else objective or "supcon"

    @field_validator("granularity")
    @classmethod
    def _neurons_need_one(cls, granularity: str, info: ValidationInfo) -> str:
        if granularity == "neuron" and (info.data.get("k") or 1) < 1:
            raise ValueError(f"k={info.data['k']:g} is less than one connection a neuron; take 'layer' or 'network'")
        return granularity

    @field_validator("oracle")
    @classmethod
    def _oracle_and_importance(cls, oracle: str | None, info: ValidationInfo) -> str | None:
        importance = info.data.get("importance", "oracle")
        if oracle is None and info.data.get("importance") == "oracle":
            raise ValueError("importance=oracle needs a full fine-tuning: the run folder or task file of method=full")
        if oracle is not None and importance != "oracle":
            raise ValueError(f"only importance=oracle reads it, and importance is {importance}")
        return oracle

    @field_validator("budget")
    @classmethod
    def _one_of_k_and_budget(cls, budget: float | None, info: ValidationInfo) -> float | None:
        if budget is not None and info.data.get("k") is not None:
            raise ValueError("k and budget say the same thing twice; give one of them")
        return budget


class OptimiserKeys(_Keys):
    """How the chosen parameters are trained."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    head_lr: float | None = Field(None, gt=0, description="learning rate of the head; left out, lr")
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    epochs: int = Field(100, gt=0)
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
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: off")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: inverse to class counts")
    drop_path: float = Field(0.0, ge=0, lt=1)
    regularisation: float | None = Field(
        None, gt=0, description="C of the linear probe's logistic regression; left out, chosen on validation images"
    )

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


class MethodKeys(_Keys):
    """Settings of the methods beside gps; each left out is the method's published one (`docs/methods.md`)."""

    rank: int | None = Field(None, gt=0, description="lora: r, 16; spt-adapter, spt-lora: inner width, 8")
    alpha: float | None = Field(None, gt=0, description="lora: the scale is alpha / rank; left out, 1")
    bottleneck: int | None = Field(None, gt=0, description="adapter: inner width; left out, a 64th of the block's")
    adapter_after: Literal["mlp", "both"] = Field("mlp", description="both: behind attention too (Houlsby)")
    prompts: int | None = Field(None, gt=0, description="vpt-shallow: 200 where left out; vpt-deep: 50 a block")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="vpt-shallow, vpt-deep")
    spt_budget: int = Field(400_000, gt=0, description="spt-adapter, spt-lora: trained parameters, head aside")


class SearchKeys(_Keys):
    """What `--search` tries; every pair is one short run judged on validation images."""

    search_lr: tuple[float, ...] = Field((3e-4, 1e-3, 3e-3, 1e-2), min_length=1)
    search_k: tuple[float, ...] = Field((1.0, 5.0), min_length=1)
    search_drop_path: tuple[float, ...] = Field((), description="left out: drop_path is not searched")
    search_epochs: int = Field(5, gt=0, description="epochs of each short run")

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


class MachineKeys(_Keys):
    """Where it runs; passed to Lightning's Trainer as they are."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = Field(1, gt=0)
    strategy: str = "auto"
    precision: Literal["32", "16-mixed", "bf16-mixed"] = "32"
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value


CLASSES_ONLY = ("shots", "ood", "cache", "label_smoothing", "mixup", "cutmix", "class_weights", "regularisation")
"""Settings that mean something for classification alone."""


class Recipe(MachineKeys, SearchKeys, OptimiserKeys, MethodKeys, SelectionKeys, DataKeys):
    """Every setting of one run."""

    model: str = Field(description="timm:NAME, hf:ID, torchvision:NAME, file:PATH or demo:NAME")
    arch: str | None = Field(None, description="architecture of a file: model, such as timm:vit_base_patch16_224")
    pretrained: bool = True
    method: Literal[
        "gps", "full", "linear", "bias", "adapter", "lora", "vpt-shallow", "vpt-deep", "ssf", "spt-adapter", "spt-lora"
    ] = "gps"

    @model_validator(mode="after")
    def _fits_the_task(self) -> Recipe:
        if self.task == "segmentation":
            if self.augment not in ("plain", "flip"):
                raise ValueError(f"augment={self.augment} is not for task=segmentation: take plain or flip")
            given = [key for key in CLASSES_ONLY if getattr(self, key) != Recipe.model_fields[key].default]
            if given:
                raise ValueError(f"task=segmentation has no classes, so it has no {', '.join(given)}")
        return self

    @property
    def per_neuron(self) -> float | None:
        """K, or None where a budget is given."""
        return self.k if self.k is not None or self.budget is not None else 1.0

    def changed(self, **values: Any) -> Recipe:
        """A copy with some values changed, checked like any other recipe."""
        return recipe_from({**self.model_dump(), **values})


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Check `values` and give the recipe; ConfigError names all mistakes at once."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        mistakes = [_mistake(detail) for detail in error.errors()]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the configuration: {'; '.join(mistakes)}") from None


def read_recipe(files: Iterable[str | Path] = (), overrides: Iterable[str] = (), **values: Any) -> Recipe:
    """A recipe from YAML files, then `values` that are not None, then `key=value` overrides; the last word wins."""
    merged: dict[str, Any] = {}
    for path in files:
        merged.update(read_yaml(Path(path)))
    merged.update({key: value for key, value in values.items() if value is not None})
    merged.update(_parse(override) for override in overrides)
    return recipe_from(merged)


def write_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text that `read_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a YAML file; ConfigError where it is missing or holds something else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{path}{line} is not YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold lines of `key: value`, and holds a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected key=value, got '{override}'")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        return key.strip(), text


def _mistake(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.5)
            return f"unknown key '{key}'" + (f" (did you mean '{near[0]}'?)" if near else "")
        case "missing":
            return f"'{key}' is missing ({Recipe.model_fields[key].description})"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
        case _:
            return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
