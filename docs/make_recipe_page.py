"""Writes docs/recipe.md, the list of all settings, from the settings themselves.

python docs/make_recipe_page.py
"""

from __future__ import annotations

import typing
from pathlib import Path

from fewtune.config import DataKeys, MachineKeys, MethodKeys, OptimiserKeys, Recipe, SearchKeys
from fewtune.methods import gps
from fewtune.methods.reach import KeptSettings

INTRODUCTION = """# Every setting of a run

A recipe is flat: the same keys stand in a YAML file and as `key=value` on the command line, where later ones win:

    fewtune fit recipe.yaml lr=3e-3 k=2 --out runs/second

The defaults are the paper's recipe for classification: Adam without weight decay, 100 epochs, linear warm-up, cosine.
An unknown key is an error that names the nearest known one; all mistakes are reported at once. The resolved recipe of
a run stands in its `config.yaml`. This page is made by `python docs/make_recipe_page.py`.
"""

GROUPS = {
    "Data": list(DataKeys.model_fields),
    "Selection": list(gps.Settings.model_fields),
    "Other methods": [key for key in MethodKeys.model_fields if key not in gps.Settings.model_fields],
    "What lies below the reach": list(KeptSettings.model_fields),
    "Optimisation": list(OptimiserKeys.model_fields),
    "Search": list(SearchKeys.model_fields),
    "Machine": list(MachineKeys.model_fields),
}


def kind(annotation: typing.Any) -> str:
    """A type as a reader of a table wants it."""
    choices = [part for part in (annotation, *typing.get_args(annotation)) if typing.get_origin(part) is typing.Literal]
    if choices:
        return " / ".join(map(str, typing.get_args(choices[0])))
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    return name.replace(" | None", "").replace(" | ", " or ")


def page() -> str:
    grouped = {key for keys in GROUPS.values() for key in keys}
    own = [key for key in Recipe.model_fields if key not in grouped]
    lines = [INTRODUCTION]
    for title, keys in {"Model and method": own, **GROUPS}.items():
        lines += [f"## {title}", "", "| key | kind | default | |", "|---|---|---|---|"]
        for key in keys:
            field = Recipe.model_fields[key]
            default = "required" if field.is_required() else f"`{field.default}`"
            lines.append(f"| `{key}` | {kind(field.annotation)} | {default} | {field.description or ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(page(), encoding="utf-8")
