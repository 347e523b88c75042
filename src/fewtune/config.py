"""The recipe of a run: every setting of `fewtune fit`, checked before any work begins.

A recipe is flat, so that a YAML file and `key=value` on the command line read alike. All mistakes are reported
at once, and an unknown key names its nearest known one. The defaults are the paper's recipe for classification
(Adam, no weight decay, 100 epochs, linear warm-up over 10, cosine to 1e-8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin

import yaml
from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from fewtune.errors import ConfigError, nearest
from fewtune.kinds import DEFAULT, KINDS
from fewtune.methods import METHODS, Method, Settings, gps
from fewtune.methods.reach import KeptSettings


def _settings(methods: Iterable[Method]) -> tuple[type[Settings], ...]:
    """The settings of all methods, without those that others are built on."""
    kinds = list(dict.fromkeys(method.settings for method in methods))
    return tuple(kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds))


class DataKeys(Settings):
    """What is learnt from, and how its images are presented."""

    task: str = Field(
        DEFAULT,
        description="multi-label: images of any number of classes, listed in a CSV file; segmentation: one mask an "
        "image; the model is a segmenter, data has masks; semantic-segmentation: masks of several classes",
    )
    data: str = Field(
        description="a folder of class folders, a CSV file of path,label, wds:SHARDS, a data set's name, or "
        "task:KEY?root=FOLDER; "
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


if TYPE_CHECKING:
    MethodKeys = gps.Settings  # what other rooms read of the methods' settings; the others are for the methods alone
else:
    MethodKeys = create_model("MethodKeys", __base__=_settings(METHODS.present.values()))


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
    strategy: str = Field("auto", description="how processes share the work: ddp, fsdp or another of Lightning's")
    precision: Literal["32", "16-mixed", "bf16-mixed"] = Field("32", description="of activations; weights stay float32")
    report: bool = Field(True, description="`fewtune fit` writes report.html into the run's folder at its end")
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = Field(
        "none", description="where curves and results go beside TensorBoard, by that library's own settings and login"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of all that is drawn: images, head, order, augmentation")

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value


class Recipe(MachineKeys, SearchKeys, OptimiserKeys, KeptSettings, MethodKeys, DataKeys):
    """Every setting of one run."""

    model: str = Field(description="timm:NAME, hf:ID, torchvision:NAME, file:PATH or demo:NAME")
    arch: str | None = Field(None, description="architecture of a file: model, such as timm:vit_base_patch16_224")
    pretrained: bool = Field(True, description="false: random weights")
    method: str = Field("gps", description=f"what is trained: {', '.join(METHODS.present)}")

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return METHODS.known(method)

    @field_validator("objective")
    @classmethod
    def _of_the_task(cls, objective: str | None, info: ValidationInfo) -> str:
        task = info.data.get("task", DEFAULT)
        known = KINDS[task].rules.objectives
        if objective is not None and objective not in known:
            raise ValueError(f"{objective} is no objective of {task}; expected one of {', '.join(known)}")
        return objective or known[0]

    @model_validator(mode="after")
    def _can_exclude(self) -> Recipe:
        given = next((key for key in ("exclude", "reach") if getattr(self, key)), None)
        if given is not None and not METHODS[self.method].excludes:
            able = ", ".join(name for name, method in METHODS.present.items() if method.excludes)
            raise ValueError(f"{given}: method={self.method} cannot leave modules out; take {able}, or no {given}")
        return self

    @model_validator(mode="after")
    def _can_keep(self) -> Recipe:
        if self.keep_prefix == "none":
            return self
        given = [key for key in ("mixup", "cutmix", "checkpoint_activations") if getattr(self, key)]
        if self.reach is None:
            raise ValueError("keep_prefix: without a reach nothing lies below it; say reach=6, for instance")
        if given:
            raise ValueError(f"keep_prefix: with {given[0]} images do not go through the frozen blocks one by one")
        if self.augment in ("flip", "fgvc") and self.prefix_views is None:
            raise ValueError(
                f"keep_prefix: augment={self.augment} shows other pixels in every epoch; take augment=plain, or "
                "prefix_views=4, for instance, to keep four views of each image and show them in turn"
            )
        return self

    @model_validator(mode="after")
    def _can_start_from_the_probe(self) -> Recipe:
        method = METHODS[self.method]
        if self.head_init == "probe" and not (method.starts_plain and method.trains_by_epochs(self.task)):
            why = "it is the probe" if method.starts_plain else "what it adds changes what the head is given"
            raise ValueError(f"head_init=probe: method={self.method} cannot start from the linear probe: {why}")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Recipe:
        rules = KINDS[self.task].rules
        if rules.augments is not None and self.augment not in rules.augments:
            able = " or ".join(rules.augments)
            raise ValueError(f"augment={self.augment} is not for task={self.task}: take {able}")
        given = [key for key in rules.without if getattr(self, key) != type(self).model_fields[key].default]
        if given:
            raise ValueError(f"task={self.task}: {rules.because}, so there is no {', '.join(given)}")
        return self

    def changed(self, **values: Any) -> Recipe:
        """A copy with some values changed, checked like any other recipe."""
        return recipe_from({**self.model_dump(), **values})

    def __reduce__(self) -> tuple[Any, ...]:
        """Through `recipe_from`: the class of a recipe whose method a package offers is made when it is asked for."""
        return recipe_from, (self.model_dump(),)


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """Check `values` and give the recipe; ConfigError names all mistakes at once."""
    kind = _recipe_class(values.get("method"))
    try:
        return kind(**{key: _listed(kind, key, value) for key, value in values.items()})
    except ValidationError as error:
        mistakes = [_mistake(detail, kind) for detail in error.errors()]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the configuration: {'; '.join(mistakes)}") from None


def _listed(kind: type[Recipe], key: str, value: Any) -> Any:
    """A list where the key takes one and a single value, or several with commas, is given: search_k=1,5."""
    field = kind.model_fields.get(key)
    if field is None or get_origin(field.annotation) is not tuple or not isinstance(value, str | int | float):
        return value
    return [part.strip() for part in str(value).split(",") if part.strip()]


def _recipe_class(method: object) -> type[Recipe]:
    """`Recipe`, with the settings of a method that a package offers among its keys."""
    if not isinstance(method, str) or method not in METHODS or issubclass(Recipe, METHODS[method].settings):
        return Recipe
    return _extended(METHODS[method].settings)


@cache
def _extended(settings: type[Settings]) -> type[Recipe]:
    bases: Any = (Recipe, settings)
    extended: type[Recipe] = create_model("Recipe", __base__=bases)
    return extended


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


def _mistake(detail: Any, kind: type[Recipe]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'{nearest(key, kind.model_fields)}"
        case "missing":
            return f"'{key}' is missing ({kind.model_fields[key].description})"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
        case _:
            return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
