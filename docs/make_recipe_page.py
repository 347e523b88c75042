"""Writes docs/recipe.md, the list of all settings, from the settings themselves.

python docs/make_recipe_page.py
"""

from __future__ import annotations

from pathlib import Path

from fewtune.recipes.settings import settings

INTRODUCTION = """# Every setting of a run

A recipe is flat: the same keys stand in a YAML file and as `key=value` on the command line, where later ones win:

    fewtune fit recipe.yaml lr=3e-3 k=2 --out runs/second

The defaults are the paper's recipe for classification: Adam without weight decay, 100 epochs, linear warm-up, cosine.
An unknown key is an error that names the nearest known one; all mistakes are reported at once. The resolved recipe of
a run stands in its `config.yaml`. `fewtune settings` prints this list, `fewtune settings WORD` a part of it.
This page is made by `python docs/make_recipe_page.py`.
"""


def page() -> str:
    lines = [INTRODUCTION]
    for title, group in settings().items():
        lines += [f"## {title}", "", "| key | kind | default | |", "|---|---|---|---|"]
        for setting in group:
            default = f"`{setting.default}`" if setting.default else "required"
            lines.append(f"| `{setting.key}` | {setting.kind} | {default} | {setting.meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(page(), encoding="utf-8")
