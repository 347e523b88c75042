"""The grid: methods x tasks x seeds x choices in one YAML file, all of it checked before any work.

settings: {model: demo:vit-small, epochs: 5}      # of every run; the keys of `fewtune fit`
tasks:
  refuse: {data: photographs/refuse, title: "refuse, 6 kinds"}
  cifar: {recipe: vtab/cifar, root: data}          # a recipe of the paper's tables, and where its data lies
methods:
  full: {method: full, choices: {lr: [1.0e-5, 1.0e-4]}}
  gps: {method: gps, k: 1, choices: {lr: [1.0e-3, 3.0e-3]}}
seeds: [0, 1, 2]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fewtune.config import Recipe, read_yaml, recipe_from
from fewtune.errors import ConfigError, FewtuneError, nearest
from fewtune.methods import METHODS
from fewtune.recipes import read

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Choices = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]
SET_BY_BENCH = {"seed", "train_on", "stop_after"}
"""Settings that the bench decides itself."""


class _Part(BaseModel):
    """What a task or a method says of itself; its other keys are settings of its runs."""

    model_config = ConfigDict(extra="allow", frozen=True)
    title: str | None = Field(None, description="how tables call it; left out, its name")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its runs."""
        return dict(self.model_extra or {})


class Task(_Part):
    """Labelled images, with the settings that go with them."""

    recipe: str | None = Field(None, description="a recipe by name, such as vtab/cifar; its settings come first")
    root: str | None = Field(None, description="the folder that holds the recipe's data")


class Method(_Part):
    """A method, with its settings and with what is chosen for it on validation images."""

    choices: Choices | None = Field(None, description="setting -> values to try; left out, the grid's")
    seeds: tuple[Seed, ...] | None = Field(None, min_length=1, description="left out, the grid's")
    paper: str | None = Field(None, description="the paper's row beside which it stands; left out, its namesake")


class Grid(BaseModel):
    """The whole grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    settings: dict[str, Any] = Field({}, description="settings of every run, as of `fewtune fit`")
    tasks: dict[Name, Task] = Field(min_length=1)
    methods: dict[Name, Method] = Field(min_length=1)
    later: tuple[Name, ...] = Field((), description="methods whose runs wait for all others, of all tasks")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    choices: Choices = Field({}, description="setting -> values to try, for methods that say nothing of their own")
    choose_seeds: tuple[Seed, ...] = Field((), description="seeds that choose; left out, the first of `seeds`")
    choose: dict[str, Any] = Field({}, description="settings of the choosing runs alone")
    grow: dict[str, Annotated[int, Field(gt=0)]] = Field(
        {}, description="setting -> how many values may be added where the best of its choices lies at an edge"
    )
    protocol: Literal["last", "best"] = Field(
        "last", description="last: train on training and validation images, take the last epoch; best: train on the "
        "training images alone, keep the best epoch on validation images, as `fewtune fit` does"
    )  # fmt: skip
    choose_epochs: bool = Field(True, description="choose the number of epochs too; else the last is taken")
    record: str | None = Field(None, description="a file of finished runs beside the grid's; they count as done")
    borrow: tuple[str, ...] = Field(
        (), description="files of other grids' finished runs; those of the same name and settings count as done too"
    )
    compare: str | None = Field(None, description="what others are compared with; left out, gps or the first")
    workers: int = Field(1, gt=0, description="runs side by side, each in a process of its own")
    threads: int = Field(1, gt=0, description="threads of each worker; on Ray, the CPUs of each run")
    gpus: float = Field(0, ge=0, description="GPUs of each run on Ray; 0.5 puts two runs on one")
    memory_gb: float | None = Field(None, gt=0, description="memory of each run on Ray; left out, it is not counted")

    @model_validator(mode="after")
    def _known_and_told_once(self) -> Grid:
        if self.compare is not None and self.compare not in self.methods:
            raise ValueError(f"compare: no method is called '{self.compare}'; there are {', '.join(self.methods)}")
        strangers = [name for name in self.later if name not in self.methods]
        if strangers:
            raise ValueError(f"later: no method is called '{strangers[0]}'; there are {', '.join(self.methods)}")
        listed = [(f"methods.{name}.seeds", part.seeds or ()) for name, part in self.methods.items()]
        for key, seeds in (("seeds", self.seeds), ("choose_seeds", self.choose_seeds), *listed):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{key}: every seed may stand there once, got {list(seeds)}")
        if self.protocol == "best" and self.choose_epochs:
            raise ValueError("protocol: best keeps the best epoch of every run; add choose_epochs=false")
        if self.choose_epochs and "epochs" in self.choose:
            raise ValueError("choose: runs of other epochs do not tell how many to train for; add choose_epochs=false")
        for key in self.grow:
            for choices in (self.choices, *(part.choices or {} for part in self.methods.values())):
                if not all(isinstance(value, int | float) and value > 0 for value in choices.get(key, ())):
                    raise ValueError(f"grow.{key}: only positive numbers go on, got {list(choices[key])}")
        return self

    @property
    def baseline(self) -> str:
        """The method with which the others are compared."""
        return self.compare or ("gps" if "gps" in self.methods else next(iter(self.methods)))

    @property
    def judged(self) -> Literal["all", "last", "best"]:
        """Which epochs of a choosing run are judged on validation images."""
        return "all" if self.choose_epochs else self.protocol

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """The seeds with which choices are made."""
        return self.choose_seeds or self.seeds[:1]

    def seeds_of(self, method: str) -> tuple[int, ...]:
        """The seeds of a method's reported runs."""
        return self.methods[method].seeds or self.seeds

    def choices_of(self, method: str) -> list[dict[str, Any]]:
        """Every combination of the values that are tried for a method; one empty choice where there is none."""
        choices = self.methods[method].choices
        given = self.choices if choices is None else choices
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]

    def chooses(self, task: str, method: str) -> bool:
        """Whether there is something to choose on validation images."""
        recipe = self.recipe(task, method, {}, self.seeds[0])
        if len(self.choices_of(method)) > 1:
            return True
        chosen = METHODS[recipe.method]
        if chosen.fit is None or chosen.trains_by_epochs(recipe.task):
            return self.choose_epochs
        return any(getattr(recipe, key) is None for key in chosen.fit.chooses)

    def recipe(self, task: str, method: str, choice: Mapping[str, Any], seed: int, **more: Any) -> Recipe:
        """The recipe of one run: the task's recipe by name, then `settings`, the task's, the method's, the choice."""
        return recipe_from({**self._values(task, method), **choice, **more, "seed": seed})

    def _values(self, task: str, method: str) -> dict[str, Any]:
        where, how = self.tasks[task], self.methods[method]
        given = {**self.settings, **where.settings, **how.settings}
        if where.recipe is None:
            return given
        return {**_by_name(where.recipe, given.get("method"), where.root).model_dump(), **given}


@cache
def _by_name(recipe: str, method: str | None, root: str | None) -> Recipe:
    """A recipe of the paper's tables, for another method with that one's settings."""
    return read([recipe, *([] if method is None else [f"method={method}"])], data=root)


def read_grid(path: Path, overrides: Iterable[str] = ()) -> Grid:
    """A grid from a YAML file, then `key=value` overrides such as `workers=2` or `tasks.refuse.data=FOLDER`.

    Raises:
        ConfigError: names all mistakes at once, and the nearest key to an unknown one.
    """
    values = read_yaml(path)
    for override in overrides:
        _put(values, override)
    if isinstance(values.get("record"), str):
        values["record"] = str(path.parent / values["record"])
    if isinstance(values.get("borrow"), list):
        values["borrow"] = [str(path.parent / str(file)) for file in values["borrow"]]
    return grid_from(values, str(path))


def grid_from(values: Mapping[str, Any], source: str = "the grid") -> Grid:
    """Check `values` and give the grid; ConfigError names all mistakes at once."""
    mistakes, grid = [], None
    try:
        grid = Grid(**values)
    except ValidationError as error:
        mistakes += [_mistake(detail) for detail in error.errors()]
    mistakes += list(_unknown(values))
    if grid is not None:
        mistakes += list(_wrong(grid))
    if mistakes:
        told = list(dict.fromkeys(mistakes))
        count = "1 mistake" if len(told) == 1 else f"{len(told)} mistakes"
        raise ConfigError(f"{count} in {source}: {'; '.join(told)}")
    assert grid is not None
    return grid


def write_grid(grid: Grid) -> str:
    """The grid as YAML text that `read_grid` reads back to an equal grid."""
    return yaml.safe_dump(grid.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _put(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"expected key=value, got '{override}'")
    *parents, last = path.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override}: {parent} holds a value and no keys")
    values[last] = yaml.safe_load(text)


def _settings_of(values: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str], Iterable[str]]]:
    """(where, its keys, keys that are known there beside the recipe's) of every part that holds settings."""
    for where in ("settings", "choices", "choose"):
        yield where, _keys(values.get(where)), ()
    for where, kind in (("tasks", Task), ("methods", Method)):
        parts = values.get(where)
        for name, part in parts.items() if isinstance(parts, dict) else ():
            yield f"{where}.{name}", _keys(part), kind.model_fields
            if isinstance(part, dict):
                yield f"{where}.{name}.choices", _keys(part.get("choices")), ()


def _keys(part: Any) -> list[str]:
    return [str(key) for key in part] if isinstance(part, dict) else []


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    for where, keys, more in _settings_of(values):
        for key in keys:
            if key in SET_BY_BENCH:
                yield f"{where}.{key}: the bench sets it itself; leave it out"
            elif key not in Recipe.model_fields and key not in more:
                yield f"unknown key '{where}.{key}'" + nearest(key, [*Recipe.model_fields, *more])


def _wrong(grid: Grid) -> Iterator[str]:
    """What the recipes of the grid's runs say is wrong with their values."""
    known = grid.model_copy(
        update={
            "settings": _only_known(grid.settings),
            "tasks": {name: _known_part(task) for name, task in grid.tasks.items()},
            "methods": {name: _known_part(method) for name, method in grid.methods.items()},
        }
    )
    for task, method in itertools.product(grid.tasks, grid.methods):
        for choice in grid.choices_of(method):
            for more in ({}, _only_known(grid.choose)):
                try:
                    known.recipe(task, method, _only_known(choice), grid.seeds[0], **more)
                except FewtuneError as error:
                    yield from re.sub(r"^\d+ mistakes? in the configuration: ", "", str(error)).split("; ")


def _known_part(part: Any) -> Any:
    return type(part)(**{**part.model_dump(include=set(type(part).model_fields)), **_only_known(part.settings)})


def _only_known(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in Recipe.model_fields and key not in SET_BY_BENCH}


def _mistake(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'" + nearest(key, Grid.model_fields)
        case "missing":
            return f"'{key}' is missing"
        case "value_error":
            return str(detail["ctx"]["error"])
        case _:
            return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
