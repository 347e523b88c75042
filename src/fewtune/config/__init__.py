"""The recipe of a run: every setting of `fewtune fit`, checked before any work begins.

A recipe is flat, so that a YAML file and `key=value` on the command line read alike. All mistakes are reported
at once, and an unknown key names its nearest known one. The defaults are the paper's recipe for classification
(Adam, no weight decay, 100 epochs, linear warm-up over 10, cosine to 1e-8).
"""

from fewtune.config.keys import DataKeys, MachineKeys, OptimiserKeys, SearchKeys
from fewtune.config.presets import Preset, presets
from fewtune.config.reading import read_recipe, read_yaml, write_recipe
from fewtune.config.recipe import MethodKeys, Recipe, recipe_from

__all__ = [
    "DataKeys",
    "MachineKeys",
    "MethodKeys",
    "OptimiserKeys",
    "Preset",
    "Recipe",
    "SearchKeys",
    "presets",
    "read_recipe",
    "read_yaml",
    "recipe_from",
    "write_recipe",
]
