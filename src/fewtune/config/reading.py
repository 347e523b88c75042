"""Recipes from YAML files and `key=value`, and back to YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fewtune.config.recipe import Recipe, recipe_from
from fewtune.errors import ConfigError


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
