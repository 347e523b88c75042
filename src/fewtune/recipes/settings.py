"""All settings of a recipe by group, with kind, default and meaning: for the command line and the documentation."""

from __future__ import annotations

import typing
from typing import NamedTuple

from fewtune.config import DataKeys, MachineKeys, MethodKeys, OptimiserKeys, Recipe, SearchKeys
from fewtune.methods import gps
from fewtune.methods.reach import KeptSettings


class Setting(NamedTuple):
    """One setting, as text."""

    key: str
    kind: str
    default: str
    """Empty where it must be given."""
    meaning: str


def settings() -> dict[str, list[Setting]]:
    """Every setting of `fewtune fit`, by group in the order of the page."""
    groups = {
        "Data": list(DataKeys.model_fields),
        "Selection": list(gps.Settings.model_fields),
        "Other methods": [key for key in MethodKeys.model_fields if key not in gps.Settings.model_fields],
        "What lies below the reach": list(KeptSettings.model_fields),
        "Optimisation": list(OptimiserKeys.model_fields),
        "Search": list(SearchKeys.model_fields),
        "Machine": list(MachineKeys.model_fields),
    }
    grouped = {key for keys in groups.values() for key in keys}
    others = [key for key in Recipe.model_fields if key not in grouped]
    return {title: list(map(_setting, keys)) for title, keys in {"Model and method": others, **groups}.items()}


def _setting(key: str) -> Setting:
    field = Recipe.model_fields[key]
    default = "" if field.is_required() else str(field.default)
    return Setting(key, _kind(field.annotation), default, field.description or "")


def _kind(annotation: typing.Any) -> str:
    """A type as a reader of a table wants it."""
    choices = [part for part in (annotation, *typing.get_args(annotation)) if typing.get_origin(part) is typing.Literal]
    if choices:
        return " / ".join(map(str, typing.get_args(choices[0])))
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    return name.replace(" | None", "").replace(" | ", " or ")
