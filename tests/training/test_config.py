"""Recipes: defaults as published, every mistake named at once, files and overrides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fewtune.config import read_recipe, recipe_from, write_recipe
from fewtune.errors import ConfigError
from fewtune.kinds import KINDS, Rules
from fewtune.methods import METHODS

BASE = {"model": "timm:test_vit", "data": "images"}


def test_defaults_are_the_published_recipe() -> None:
    recipe = recipe_from(BASE)
    assert (recipe.method, recipe.optimizer, recipe.weight_decay) == ("gps", "adam", 0.0)
    assert (recipe.epochs, recipe.warmup, recipe.warmup_lr, recipe.min_lr) == (100, 10, 1e-7, 1e-8)
    assert (recipe.per_neuron, recipe.temperature, recipe.ema) == (1.0, 0.07, None)


def test_all_mistakes_are_named_at_once_and_unknown_keys_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        recipe_from({"data": "images", "epocs": 3, "lr": -1, "method": "gsp", "warmup_epochs": 100})
    message = str(error.value)
    assert message.startswith("5 mistakes in the configuration")
    for part in ("'epocs' (did you mean 'epochs'?)", "lr: input should be greater than 0, got -1", "'gps', 'full'",
                 "'model' is missing", "warmup_epochs: must be smaller than epochs, 100"):  # fmt: skip
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"k": 1, "budget": 0.01}, "k and budget"),
        ({"cache": True, "augment": "fgvc"}, "only augment=plain"),
        ({"search_lr": [1e-3, 0]}, "greater than 0"),
        ({"search_drop_path": [1.0]}, "between 0 and 1"),
        ({"strategy": "fsdp"}, "take fsdp2"),
        ({"precision": "64"}, "'32', '16-mixed' or 'bf16-mixed'"),
    ],
)
def test_values_that_contradict_each_other(values: dict, part: str) -> None:
    with pytest.raises(ConfigError, match="1 mistake") as error:
        recipe_from({**BASE, **values})
    assert part in str(error.value)


def test_overrides_beat_options_and_options_beat_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: a\ndata: b\nlr: 1e-3\nk: 2\nexclude: ['head*']\n")
    recipe = read_recipe([file], ["k=5", "search_lr=[1e-3, 2e-3]", "devices=2"], model="timm:test_vit", data=None)
    assert (recipe.model, recipe.data, recipe.lr, recipe.k) == ("timm:test_vit", "b", 1e-3, 5.0)
    assert (recipe.exclude, recipe.search_lr, recipe.devices) == (("head*",), (1e-3, 2e-3), 2)


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = recipe_from({**BASE, "lr": 3e-4, "precision": 32, "exclude": ["blocks.0"], "ema": 0.99})
    file = tmp_path / "config.yaml"
    file.write_text(write_recipe(recipe))
    assert read_recipe([file]) == recipe


@pytest.mark.parametrize(("epochs", "warmup"), [(100, 10), (300, 10), (30, 3), (8, 0)])
def test_warmup_is_a_tenth_and_at_most_ten(epochs: int, warmup: int) -> None:
    assert recipe_from({**BASE, "epochs": epochs}).warmup == warmup
    assert recipe_from({**BASE, "epochs": epochs, "warmup_epochs": 5}).warmup == 5


def test_files_and_overrides_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [\n")
    listed = tmp_path / "list.yaml"
    listed.write_text("- model\n")
    for files, overrides, part in [
        ([tmp_path / "none.yaml"], [], "no configuration file"),
        ([broken], [], "line 2 is not YAML"),
        ([listed], [], "holds a list"),
        ([], ["lr"], "expected key=value"),
    ]:
        with pytest.raises(ConfigError, match=part):
            read_recipe(files, overrides, **BASE)


def test_changed_copies_are_checked() -> None:
    recipe = recipe_from(BASE)
    assert recipe.changed(lr=2.0).lr == 2.0
    with pytest.raises(ConfigError):
        recipe.changed(lr=0)


def test_lists_on_the_command_line() -> None:
    given = {"model": "timm:test_vit", "data": "x"}
    got = read_recipe([], ["search_k=1,5", "search_lr=1e-3, 2e-3", "exclude=stem*"], **given)
    assert (got.search_k, got.search_lr, got.exclude) == ((1.0, 5.0), (1e-3, 2e-3), ("stem*",))
    assert read_recipe([], ["search_k=[1,5]", "exclude=head,*stem"], **given).exclude == ("head", "*stem")
    assert read_recipe([], ["search_k=2"], **given).search_k == (2.0,)


def test_the_task_is_any_kind_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules say what a recipe of it may hold, and whether the linear probe is solved in one go."""
    given = {"model": "timm:test_vit", "data": "x"}
    with pytest.raises(ConfigError, match=r"there is no task 'depth'; expected one of 'classification', 'multi-label'"):
        recipe_from({**given, "task": "depth"})
    rules = Rules(objectives=("l1", "l2"), augments=("plain",), without=("mixup",))
    monkeypatch.setitem(KINDS, "depth", SimpleNamespace(name="depth", rules=rules))
    recipe = recipe_from({**given, "task": "depth"})
    assert (recipe.task, recipe.objective) == ("depth", "l1")
    assert recipe_from({**given, "task": "depth", "objective": "l2"}).objective == "l2"
    for wrong, words in (
        ({"objective": "supcon"}, "supcon is no objective of depth; expected one of l1, l2"),
        ({"augment": "flip"}, "augment=flip is not for task=depth: take plain"),
        ({"mixup": 0.2}, "task=depth: they mean nothing for it, so there is no mixup"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe_from({**given, "task": "depth", **wrong})
    assert METHODS["linear"].trains_by_epochs("depth")
    assert not METHODS["linear"].trains_by_epochs("classification")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"importance": "snr", "settle": 0.5}, "settle: only importance=gradient reads it, and importance is snr"),
        ({"importance": "random", "scored_images": 64}, "scored_images: importance=random does not read it"),
    ],
)
def test_a_setting_that_the_criterion_does_not_read_is_refused(given: dict[str, str | float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_from({**BASE, **given})
    assert recipe_from({**BASE, "settle": 0.5}).settle == 0.5
    assert recipe_from({**BASE, "importance": "snr", "scored_images": 64}).scored_images == 64
