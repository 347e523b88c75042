"""Writes docs/recipe.md, the list of all settings, from the settings themselves.

python docs/make_recipe_page.py
"""

from __future__ import annotations

from pathlib import Path

from fewtune.recipes.settings import settings

INTRODUCTION = """# Every setting of a run

A run is described by a recipe: a flat list of keys. You can write them into a YAML file, give them as `key=value` on
the command line, or both. What comes later on the line wins:

```yaml
# recipe.yaml
model: timm:vit_small_patch16_224.augreg_in21k
data: photos
test_fraction: 0.2
```

```sh
fewtune fit recipe.yaml lr=3e-3 k=2 --out runs/second
fewtune settings learning        # prints the settings that are about a word; without a word, all of them
```

The defaults are the paper's recipe for classification: Adam without weight decay, 100 epochs, linear warm-up, cosine.
If a key is unknown, the error names the nearest known one, and all mistakes are reported at once. The whole recipe of a
run stands in its `config.yaml`.

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
