"""A recipe: the settings of all groups and methods together, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_origin

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from fewtune.config.keys import DataKeys, MachineKeys, OptimiserKeys, SearchKeys
from fewtune.config.presets import Preset, filled
from fewtune.errors import ConfigError, nearest
from fewtune.kinds import DEFAULT, KINDS
from fewtune.methods import METHODS, Method, Settings, gps
from fewtune.methods.reach import KeptSettings


def _settings(methods: Iterable[Method]) -> tuple[type[Settings], ...]:
    """The settings of all methods, without those that others are built on."""
    kinds = list(dict.fromkeys(method.settings for method in methods))
    return tuple(kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds))


if TYPE_CHECKING:
    MethodKeys = gps.Settings  # what other rooms read of the methods' settings; the others are for the methods alone
else:
    MethodKeys = create_model("MethodKeys", __base__=_settings(METHODS.present.values()))


class Recipe(MachineKeys, SearchKeys, OptimiserKeys, KeptSettings, MethodKeys, DataKeys):
    """Every setting of one run."""

    model: str = Field(description="timm:NAME, hf:ID, torchvision:NAME, file:PATH or demo:NAME")
    preset: Preset | None = Field(
        None, description="settings that go together, where nothing else is said: paper, to the letter; fast or best, "
        "ours; `fewtune recipes show best` shows one",
    )  # fmt: skip
    arch: str | None = Field(None, description="architecture of a file: model, such as timm:vit_base_patch16_224")
    pretrained: bool = Field(True, description="false: random weights")
    quantise: Literal["int8", "nf4"] | None = Field(
        None, description="keep the weights of linear layers in 8 bits (by torchao) or 4 (by bitsandbytes); the head "
        "and what is trained stay float32",
    )  # fmt: skip
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

    @field_validator("quantise")
    @classmethod
    def _not_in_rows(cls, word: str | None, info: ValidationInfo) -> str | None:
        if word is not None and info.data.get("strategy") == "fsdp2":
            raise ValueError("strategy=fsdp2 shares out float weights alone; take strategy=ddp, or no quantise")
        return word

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
        if self.augment in ("flip", "fgvc", "rand") and self.prefix_views is None:
            raise ValueError(
                f"keep_prefix: augment={self.augment} shows other pixels in every epoch; take augment=plain, or "
                "prefix_views=4, for instance, to keep four views of each image and show them in turn"
            )
        return self

    @model_validator(mode="after")
    def _can_be_noisy(self) -> Recipe:
        if self.noise and self.method != "gps":
            raise ValueError(f"noise: method={self.method} does not train connections; take method=gps, or noise=0")
        mixes = [key for key in ("mixup", "cutmix") if getattr(self, key)]
        if self.consistency and mixes:
            raise ValueError(f"consistency: with {mixes[0]} no image is shown twice; give one of them")
        return self

    @model_validator(mode="after")
    def _can_start_from_the_probe(self) -> Recipe:
        method = METHODS[self.method]
        if self.head_init == "probe" and not (method.starts_plain and method.trains_by_epochs(self.task)):
            why = "it is the probe" if method.starts_plain else "what it adds changes what the head is given"
            raise ValueError(f"head_init=probe: method={self.method} cannot start from the linear probe: {why}")
        return self

    @model_validator(mode="after")
    def _has_stages(self) -> Recipe:
        if self.stages > 1 and METHODS[self.method].grow is None:
            raise ValueError(f"stages: method={self.method} chooses no connections bit by bit; leave it out")
        if self.stages > self.epochs:
            raise ValueError(f"stages={self.stages}: each stage is an epoch at least, and there are {self.epochs}")
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
    values = filled(values)
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
