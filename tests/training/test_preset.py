"""Presets: what they set, what gives way to what, and which one a folder of images gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from fewtune.config import presets, read_recipe, recipe_from
from fewtune.config.presets import shown
from fewtune.errors import ConfigError
from fewtune.recipes import names, read
from fewtune.tasks import prepare
from fewtune.training.preset import estimate, preset_for
from runs import coloured_folder, fewtune, tiny_recipe

NAMED = {"model": "timm:test_vit", "data": "photos"}
BARE = ["--model", "timm:test_vit", "pretrained=false", "image_size=32", "test_fraction=0.25", "batch_size=8"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_recipe_and_is_shown_as_it_stands(name: str) -> None:
    recipe = recipe_from({**NAMED, "preset": name})
    assert {key: getattr(recipe, key) for key in presets()[name]} == presets()[name]
    assert yaml.safe_load(shown(name)) == {name: presets()[name]}
    assert recipe_from(recipe.model_dump()) == recipe


def test_the_papers_is_the_default_of_a_recipe() -> None:
    assert recipe_from({**NAMED, "preset": "paper"}).changed(preset=None) == recipe_from(NAMED)


def test_what_a_user_says_wins_over_a_preset(tmp_path: Path) -> None:
    assert recipe_from({**NAMED, "preset": "best", "lr": 0.02, "epochs": 3}).lr == 0.02
    file = tmp_path / "mine.yaml"
    file.write_text("preset: best\nlr: 0.05\n")
    recipe = read_recipe([file], ["epochs=7"], **NAMED)
    assert (recipe.lr, recipe.epochs, recipe.head_init) == (0.05, 7, "probe")
    published = next(name for name in names() if name.startswith("vtab/"))
    assert read([published, "preset=best"], data="root").lr == read([published], data="root").lr
    with pytest.raises(ConfigError, match="preset: input should be 'paper', 'fast' or 'best', got 'bst'"):
        recipe_from({**NAMED, "preset": "bst"})


def test_best_is_taken_where_it_fits_the_time(images: Path) -> None:
    work = prepare(recipe_from({**NAMED, "data": str(images), "pretrained": False, "image_size": 32}))
    assert preset_for(work, None)[0].preset == "best"
    assert preset_for(work, 1e6)[0].preset == "best"
    fast, why = preset_for(work, 1e-3)
    assert fast.preset == "fast"
    assert (fast.reach, fast.keep_prefix) == ("half", "float16")
    assert why.startswith("preset=fast and not best, since it takes about")
    longer = work.renewed(work.recipe.changed(epochs=400))
    assert estimate(longer) > 1.5 * estimate(work.renewed(work.recipe.changed(epochs=100)))


def test_a_preset_gives_way_to_settings_and_to_the_model(images: Path) -> None:
    base = {**NAMED, "data": str(images), "pretrained": False, "image_size": 32}
    cached, why = preset_for(prepare(recipe_from({**base, "cache": True})), None)
    assert (cached.cache, cached.augment, cached.head_init) == (True, "plain", "probe")
    assert why.endswith("without its augment, which does not go with the rest")
    work = prepare(recipe_from(base))
    head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 64), head)
    odd = replace(work, backbone=replace(work.backbone, model=model, head=("2",)))
    recipe, why = preset_for(odd, None)
    assert recipe.head_init == "random"
    assert "without its head_init" in why


def test_a_bare_folder_gets_best_and_goes_on_with_it(images: Path, tmp_path: Path) -> None:
    given = ["fit", *BARE, "--data", images, "epochs=2", "--out", tmp_path / "run", "--json"]
    done = fewtune(*given)
    assert done.returncode == 0, done.stderr
    assert "preset=best, since none is named and no --time is given" in done.stderr
    metrics = json.loads(done.stdout)
    assert "gain" in metrics["start"]
    recipe = read_recipe([tmp_path / "run" / "config.yaml"])
    assert (recipe.preset, recipe.epochs, recipe.lr, recipe.augment) == ("best", 2, presets()["best"]["lr"], "flip")
    again = fewtune(*given, "--resume")
    assert again.returncode == 0, again.stderr
    assert "is complete already" in again.stderr
    refused = fewtune(*given, "--overwrite", "preset=best", "--time", "1min")
    assert refused.returncode == 2
    assert "no preset and no recipe" in " ".join(refused.stderr.split())


def digits_folder(root: Path, each: int) -> Path:
    """Real handwritten digits of scikit-learn, in class folders."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for number, row in enumerate(pixels[labels == label][:each]):
            image = Image.fromarray((row.reshape(8, 8) * 15).astype(np.uint8)).convert("RGB")
            image.save(root / str(label) / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 3, 10])
def test_a_default_run_is_never_significantly_below_the_probe(epochs: int, tmp_path: Path) -> None:
    """Pretrained EfficientNet-Lite0 on real digits, every setting but the number of epochs left as it is."""
    images = digits_folder(tmp_path / "digits", each=40)
    given: dict[str, Any] = {"image_size": 64, "test_fraction": 0.5, "epochs": epochs}
    settings = [f"{key}={value}" for key, value in given.items()]
    done = fewtune("fit", "--model", "demo:efficientnet-lite0", "--data", images, *settings, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "test accuracy of the linear probe" in " ".join(done.stdout.split())
    assert "what tuning brought, points" in " ".join(done.stdout.split())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["validation"]["accuracy"] >= metrics["start"]["validation"]["accuracy"]
    assert metrics["start"]["gain"]["high"] >= 0, metrics["start"]


def test_augmentation_by_chance_is_drawn_from_the_seed(images: Path) -> None:
    work = prepare(tiny_recipe(images, augment="rand"))
    torch.manual_seed(3)
    one = work.train[0][0]
    other = work.train[0][0]
    torch.manual_seed(3)
    assert torch.equal(work.train[0][0], one)
    assert not torch.equal(one, other)
    assert one.shape == (3, 32, 32)
    assert torch.equal(work.evaluated(work.data.train)[0][0], work.evaluated(work.data.train)[0][0])
