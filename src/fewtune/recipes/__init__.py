"""Recipes: every row of the paper's tables, ready to run, as YAML files beside this one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from fewtune.config import Recipe, read_recipe, read_yaml
from fewtune.errors import ConfigError, nearest
from fewtune.kinds import DEFAULT, KINDS

FOLDER = Path(__file__).parent
PEERS = FOLDER / "peers"

log = logging.getLogger("fewtune")


def names() -> list[str]:
    """The names of all recipes: paths below this folder without .yaml."""
    files = (path for path in FOLDER.rglob("*.yaml") if PEERS not in path.parents)
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in files)


def recipe_file(item: str) -> Path:
    """A YAML file: the one of a recipe's name, else the path itself.

    Raises:
        ConfigError: there is neither; the nearest name is told.
    """
    if item in names():
        return FOLDER / f"{item}.yaml"
    path = Path(item).expanduser()
    if path.is_file():
        return path
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"no configuration file at {item}")
    hint = nearest(item, names(), count=3, cutoff=0.4, otherwise="; `fewtune recipes list` shows all")
    raise ConfigError(f"a setting reads key=value, and no recipe and no YAML file is called {item}{hint}")


def read(items: Iterable[str], *, model: str | None = None, data: str | None = None) -> Recipe:
    """A recipe from names, YAML files and key=value settings; the last word wins, and settings over files.

    For a recipe that uses a declared data set, `data` is the folder in which it lies (ROOT); `data=…` among the
    settings replaces the data set. With a recipe by name, `method=NAME` of a peer brings that peer's settings from
    its paper (recipes/peers/NAME.yaml) before all other settings.

    Raises:
        ConfigError: names all mistakes at once.
    """
    given = list(items)
    settings = [item for item in given if "=" in item]
    files = [recipe_file(item) for item in given if "=" not in item]
    files = _with_peer(files, settings)
    declared = next((values["data"] for file in reversed(files) if "data" in (values := read_yaml(file))), "")
    if data and _is_task(declared) and ":" not in data.split("/")[0]:
        data = f"{declared.partition('?')[0]}?root={data}"
    return read_recipe(files, settings, model=model, data=data)


def run_name(items: Iterable[str], recipe: Recipe) -> str:
    """What the folder of a run is called where the user does not say: after the recipe, else after the data."""
    named = [item for item in items if "=" not in item and item in names()]
    if named:
        return f"{named[-1].replace('/', '-')}-{recipe.method}"
    data = recipe.data.partition("?root=")[0] if _is_task(recipe.data) else Path(recipe.data).name
    return f"{data.removeprefix('task:').replace(':', '-')}-{recipe.method}"


def _is_task(data: object) -> bool:
    return isinstance(data, str) and data.startswith("task:")


def _with_peer(files: list[Path], settings: list[str]) -> list[Path]:
    """After a recipe by name, the file of the peer that takes the place of its method."""
    method = next((item.partition("=")[2] for item in reversed(settings) if item.startswith("method=")), "gps")
    named = [number for number, file in enumerate(files, 1) if FOLDER in file.parents]
    if not named:
        return files
    rules = KINDS[read_yaml(files[named[-1] - 1]).get("task", DEFAULT)].rules
    path = PEERS / rules.peers / f"{method}.yaml"
    if not path.is_file():
        return files
    name = path.relative_to(FOLDER)
    log.info("method=%s: the settings of recipes/%s replace the recipe's", method, name.as_posix())
    return [*files[: named[-1]], path, *files[named[-1] :]]
