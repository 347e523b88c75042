"""The tasks of `fewtune fit-many` in one YAML file, all of it checked before any work.

settings: {model: demo:efficientnet-lite0, k: 4, epochs: 20}      # of every task; the keys of `fewtune fit`
share: 0.25
tasks:
  land: {data: images/land}
  refuse: {data: images/refuse, test_fraction: 0.2}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fewtune.config import Recipe, read_yaml, recipe_from
from fewtune.errors import ConfigError, FewtuneError, nearest
from fewtune.kinds import KINDS

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
OF_ALL = (
    "model", "arch", "pretrained", "quantise", "image_size", "drop_path", "method", "k", "granularity", "bias", "scale",
    "norm", "relative_position", "exclude", "importance", "seed", "mixup", "cutmix",
)  # fmt: skip
"""Settings that must be the same for all tasks."""
DIGITS = 6
"""To which connections a neuron are rounded: a tenth of ten is one."""


class ManyTasks(BaseModel):
    """Tasks of one backbone, and how much of what is trained they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    settings: dict[str, Any] = Field({}, description="settings of every task, as of `fewtune fit`")
    share: float = Field(0.25, ge=0, le=1, description="part of all tasks' connections together that is shared")
    tasks: dict[Name, dict[str, Any]] = Field(min_length=1, description="name -> settings of that task, its data first")

    def recipe(self, task: str) -> Recipe:
        """A task's recipe as if it were trained alone, on one device: its k is that without sharing."""
        recipe = self.stated(task).changed(devices=1, strategy="auto")
        return recipe if recipe.k is not None or recipe.budget is not None else recipe.changed(k=1.0)

    def stated(self, task: str) -> Recipe:
        """A task's recipe as it is said."""
        return recipe_from({**self.settings, **self.tasks[task]})

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.tasks)

    def shared_k(self) -> float:
        """Shared connections a neuron: the shared part of those of all tasks together, which is trained once."""
        return round(self.share * len(self.tasks) * self._k, DIGITS)

    def own_k(self) -> float:
        """Each task's own connections a neuron."""
        return round((1 - self.share) * self._k, DIGITS)

    @property
    def _k(self) -> float:
        return float(self.recipe(self.names[0]).k or 1)


def read_tasks(path: Path, overrides: Iterable[str] = ()) -> ManyTasks:
    """The tasks of a YAML file, then `key=value` overrides: `share=0.25`, `tasks.NAME.data=FOLDER`, else a setting.

    Raises:
        ConfigError: something is unknown, missing or out of range; or the tasks have not one backbone and one budget.
    """
    values = read_yaml(path)
    for override in overrides:
        _put(values, override)
    try:
        many = ManyTasks(**values)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(map(_mistake, error.errors()))) from None
    _check(many, path)
    return many


def write_tasks(many: ManyTasks) -> str:
    """The tasks as YAML text that `read_tasks` reads back to equal tasks."""
    return yaml.safe_dump(many.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check(many: ManyTasks, path: Path) -> None:
    recipes = {}
    for name in many.names:
        try:
            recipes[name] = many.stated(name)
        except FewtuneError as error:
            raise ConfigError(f"{path}, tasks.{name}: {error}") from None
    first = recipes[many.names[0]]
    if first.method != "gps" or not KINDS[first.task].rules.one_label or first.budget is not None or first.selection:
        raise ConfigError(f"{path}: tasks share connections of method=gps, counted by k, in classification")
    if any(recipe.devices not in ("auto", 1) or recipe.num_nodes > 1 for recipe in recipes.values()):
        raise ConfigError(f"{path}: fit-many trains on one device; leave devices and num_nodes out")
    if first.train_on != "train":
        raise ConfigError(f"{path}: the shared part's epoch is chosen on validation images; leave train_on out")
    if first.granularity == "columns" or any(recipe.stages > 1 for recipe in recipes.values()):
        raise ConfigError(f"{path}: a shared part is chosen at once and neuron by neuron; leave columns and stages out")
    if first.mixup or first.cutmix:
        raise ConfigError(f"{path}: mixup and cutmix would mix images of several tasks; leave them out")
    for name, recipe in recipes.items():
        other = [key for key in OF_ALL if getattr(recipe, key) != getattr(first, key)]
        if other:
            raise ConfigError(
                f"{path}: {other[0]} must be the same for all tasks, and is {getattr(first, other[0])!r} for "
                f"{many.names[0]} and {getattr(recipe, other[0])!r} for {name}"
            )
    for what, k in (("shared", many.shared_k()), ("own", many.own_k())):
        if first.granularity == "neuron" and 0 < k < 1:
            raise ConfigError(
                f"{path}: share={many.share:g} of k={first.k:g} leaves {k:.3g} {what} connections a neuron, less than "
                "one; raise k, take another share, or granularity=layer"
            )


def _put(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected key=value, got '{override}'")
    *parents, last = key.strip().split(".")
    if not parents and last not in ManyTasks.model_fields:
        parents = ["settings"]
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override}: {parent} holds a value and no keys")
    values[last] = yaml.safe_load(text)


def _mistake(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, ManyTasks.model_fields)}"
    return f"'{key}' is missing" if detail["type"] == "missing" else f"{key}: {detail['msg'].lower()}"
