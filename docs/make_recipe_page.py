"""Writes docs/recipe.md, the list of all settings, from the settings themselves.

python docs/make_recipe_page.py
"""

from __future__ import annotations

import typing
from pathlib import Path

from fewtune.config import DataKeys, MachineKeys, MethodKeys, OptimiserKeys, Recipe, SearchKeys, SelectionKeys

INTRODUCTION = """# Every setting of a run

A recipe is flat: the same keys stand in a YAML file and as `key=value` on the command line, where later ones win:

    fewtune fit recipe.yaml lr=3e-3 k=2 --out runs/second

The defaults are the paper's recipe for classification: Adam without weight decay, 100 epochs, linear warm-up, cosine.
An unknown key is an error that names the nearest known one; all mistakes are reported at once. The resolved recipe of
a run stands in its `config.yaml`. This page is made by `python docs/make_recipe_page.py`.
"""

GROUPS = {
    "Data": DataKeys,
    "Selection": SelectionKeys,
    "Other methods": MethodKeys,
    "Optimisation": OptimiserKeys,
    "Search": SearchKeys,
    "Machine": MachineKeys,
}


def kind(annotation: typing.Any) -> str:
    """A type as a reader of a table wants it."""
    choices = [part for part in (annotation, *typing.get_args(annotation)) if typing.get_origin(part) is typing.Literal]
    if choices:
        return " / ".join(map(str, typing.get_args(choices[0])))
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    return name.replace(" | None", "").replace(" | ", " or ")


def page() -> str:
    grouped = {key for keys in GROUPS.values() for key in keys.model_fields}
    own = [key for key in Recipe.model_fields if key not in grouped]
    lines = [INTRODUCTION]
    for title, keys in {"Model and method": own, **{t: list(k.model_fields) for t, k in GROUPS.items()}}.items():
        lines += [f"## {title}", "", "| key | kind | default | |", "|---|---|---|---|"]
        for key in keys:
            field = Recipe.model_fields[key]
            default = "required" if field.is_required() else f"`{field.default}`"
            lines.append(f"| `{key}` | {kind(field.annotation)} | {default} | {field.description or ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(page(), encoding="utf-8")
