"""Writes docs/recipe.md, the list of all settings, from the settings themselves.

python docs/make_recipe_page.py
"""

from __future__ import annotations

from pathlib import Path

from fewtune.config import presets
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
A folder of classes that `fewtune fit` is given without a recipe, a YAML file or `preset=` gets a [preset](#presets).
If a key is unknown, the error names the nearest known one, and all mistakes are reported at once. The whole recipe of a
run stands in its `config.yaml`.

This page is made by `python docs/make_recipe_page.py`.
"""


PRESETS = """## Presets

`preset=paper`, `preset=fast` and `preset=best` set what the table says. Every setting that a file or the command
line names wins over a preset. A folder of classes without any of these gets `best`; with `--time 10min`, it gets
`fast` where `best` would take longer by a few timed steps. What of a preset does not go with your other settings or
with the model is left out. The run says which it takes, why, and what it leaves out; `config.yaml` keeps it. In
Python nothing is chosen: `recipe_from({"preset": "best", …})` asks for one. `fast` and `best` are provisional:
their rates, epochs and augmentation are not screened yet.
"""


def presets_table() -> list[str]:
    chosen = presets()
    keys = list(dict.fromkeys(key for settings in chosen.values() for key in settings))
    header = ["| key | " + " | ".join(chosen) + " |", "|---" * (1 + len(chosen)) + "|"]
    cells = [[f"`{settings[key]}`" if key in settings else "" for settings in chosen.values()] for key in keys]
    return [*header, *(f"| `{key}` | " + " | ".join(row) + " |" for key, row in zip(keys, cells, strict=True)), ""]


def page() -> str:
    lines = [INTRODUCTION, PRESETS, *presets_table()]
    for title, group in settings().items():
        lines += [f"## {title}", "", "| key | kind | default | |", "|---|---|---|---|"]
        for setting in group:
            default = f"`{setting.default}`" if setting.default else "required"
            lines.append(f"| `{setting.key}` | {setting.kind} | {default} | {setting.meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(page(), encoding="utf-8")
