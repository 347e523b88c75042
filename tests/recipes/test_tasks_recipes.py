"""Recipes: the files are those of the table, every one validates and trains two steps on its miniature."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import miniatures
from fewtune import recipes
from fewtune.classification.learner import Classifier
from fewtune.cli.app import app
from fewtune.config import Recipe
from fewtune.errors import ConfigError
from fewtune.methods import METHODS
from fewtune.recipes.table import ROWS
from fewtune.recipes.write import render
from fewtune.tasks import fit

SMALLEST = {
    "vit_b16": "timm:test_vit", "swin_b": "timm:swin_tiny_patch4_window7_224", "convnext_b": "timm:test_convnext"
}  # fmt: skip
"""The smallest model of each family that timm has."""
CLASSIFICATION = [name for name, row in ROWS.items() if row.settings.get("task") != "segmentation"]
FULL_SIZE = ("fgvc/oxford-flowers-vit_b16", "cifar-100/swin_b", "fgvc/cub-200-2011-convnext_b")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every training step that is made."""
    made: list[int] = []
    step = Classifier.training_step

    def counted(self: Classifier, batch: list, index: int) -> object:
        made.append(len(batch[0]))
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", counted)
    return made


def at(name: str, root: Path, **changes: object) -> Recipe:
    """A recipe for the data below `root`, with untrained weights on the CPU."""
    recipe = recipes.read([name], data=str(root))
    return recipe.changed(pretrained=False, accelerator="cpu", **changes)


def miniature(name: str, root: Path, batch: int) -> None:
    """The data set of a recipe with as many training images as give two steps."""
    row = ROWS[name]
    if row.data == "imagenet-1k":
        miniatures.build(row.data, root, train=max(batch // 5 + 2, 21), test=1)
        for key in row.settings.get("ood", ()):
            miniatures.build(key, root, test=2)
    elif row.data == "cifar-100":
        miniatures.build(row.data, root, train=round(1.2 * batch) + 4, test=4)
    else:
        miniatures.build(row.data, root, train=batch + 3, val=4, test=5)


def test_number_of_recipes() -> None:
    assert recipes.names() == sorted(ROWS)
    assert Counter(name.split("/")[0] for name in recipes.names()) == {
        "fgvc": 15, "vtab": 19, "cifar-100": 3, "imagenet-1k": 3, "few-shot": 5, "ood": 1,
        "kvasir-seg": 1,
    }  # fmt: skip
    assert len(recipes.names()) == 47


@pytest.mark.parametrize("name", ROWS)
def test_file_is_that_of_the_table(name: str) -> None:
    text = recipes.recipe_file(name).read_text(encoding="utf-8")
    assert text == render(ROWS[name])
    row = ROWS[name]
    for words in (f"fewtune fit {name} --data ROOT", "ours        not yet measured", "normalised by"):
        assert words in text
    assert row.paper is None or row.paper in text
    if name not in CLASSIFICATION:
        return  # its values are those of test_segmentation_recipes.py
    recipe = recipes.read([name])
    assert (recipe.optimizer, recipe.weight_decay, recipe.epochs, recipe.warmup) == ("adam", 0.0, 100, 10)
    assert (recipe.warmup_lr, recipe.min_lr, recipe.image_size, recipe.method) == (1e-7, 1e-8, 224, "gps")


def test_values_of_the_paper() -> None:
    def values(name: str) -> tuple:
        recipe = recipes.read([name])
        return recipe.lr, recipe.batch_size, recipe.k, recipe.drop_path, recipe.ema, recipe.augment

    assert values("fgvc/cub-200-2011-vit_b16") == (3e-3, 32, 2, 0, 0.9998, "fgvc")
    assert values("fgvc/oxford-flowers-vit_b16") == (1e-3, 32, 1, 0.1, 0.99, "fgvc")
    assert values("fgvc/stanford-dogs-convnext_b") == (1e-4, 64, 1, 0, 0.9998, "fgvc")
    assert values("vtab/patch_camelyon") == (4e-3, 32, 2, 0, None, "plain")
    assert values("vtab/smallnorb_ele") == (3e-4, 32, 1, 0.2, None, "plain")
    assert recipes.read(["cifar-100/swin_b"]).relative_position == "all"
    vtab = [float(row.paper or "nan") for row in ROWS.values() if row.name.startswith("vtab/")]
    assert sum(vtab) / len(vtab) == pytest.approx(75.18, abs=0.005)  # the mean that Tab. 3 prints
    for key, mean in (("vit_b16", 91.78), ("swin_b", 92.56), ("convnext_b", 93.32)):  # Tab. 9
        rows = [row for name, row in ROWS.items() if name.startswith("fgvc/") and name.endswith(key)]
        figures = [float(row.paper or "nan") for row in rows]
        assert sum(figures) / 5 == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_two_steps_with_the_smallest_model(name: str, tmp_path: Path, steps: list[int]) -> None:
    row = ROWS[name]
    batch = row.settings["batch_size"]
    miniature(name, tmp_path, batch)
    few = row.settings.get("shots", 99) * len(miniatures.WNIDS) <= batch  # one step an epoch
    model = SMALLEST[row.checkpoint.key]
    recipe = at(name, tmp_path, model=model, image_size=32, epochs=2 if few else 1)
    metrics = fit(recipe, tmp_path / "run").metrics
    assert len(steps) == 2
    assert few or steps[0] == batch
    assert metrics["trained"] > 0
    assert 0 <= metrics["test"]["accuracy"]["value"] <= 1
    assert set(metrics.get("ood", ())) == set(row.settings.get("ood", ()))
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    changed = {"data", "model", "image_size", "epochs"}
    as_written = recipes.read([name]).model_dump(mode="json")
    assert {key for key in kept if kept[key] != as_written[key]} <= changed | {"pretrained", "accelerator"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_two_steps_unsubstituted(name: str, tmp_path: Path, steps: list[int]) -> None:
    """The architecture and image size of the recipe as they are, one of each family."""
    data = ROWS[name].data
    miniatures.build(data, tmp_path, train=5 if data == "cifar-100" else 3, val=1, test=1)
    recipe = at(name, tmp_path, epochs=1, batch_size=2, val_fraction=0.2)
    metrics = fit(recipe, tmp_path / "run").metrics
    assert len(steps) == 2
    assert metrics["model"] == ROWS[name].checkpoint.model
    assert metrics["trained"] > 80_000 * recipe.k  # type: ignore[operator]


def test_recipe_by_name_path_and_overrides(tmp_path: Path) -> None:
    name = "fgvc/nabirds-vit_b16"
    assert recipes.read([name], data="/data").data == "task:nabirds?root=/data"
    assert recipes.read([str(recipes.recipe_file(name))], data="/data").data == "task:nabirds?root=/data"
    assert recipes.read([name, "k=20", "data=demo:digits"], data="/data").data == "demo:digits"
    assert recipes.read([name], data="demo:digits").data == "demo:digits"
    own = tmp_path / "own.yaml"
    own.write_text("lr: 0.5\n")
    assert recipes.read([name, str(own)]).lr == 0.5
    assert recipes.run_name([name], recipes.read([name])) == "fgvc-nabirds-vit_b16-gps"
    with pytest.raises(ConfigError, match=r"did you mean.*fgvc/nabirds-vit_b16"):
        recipes.read(["fgvc/nabird-vit_b16"])
    with pytest.raises(ConfigError, match="no configuration file"):
        recipes.read(["absent.yaml"])


def test_peers_bring_the_settings_of_their_papers(tmp_path: Path, steps: list[int]) -> None:
    name = "fgvc/cub-200-2011-vit_b16"
    full = recipes.read([name, "method=full"])
    assert (full.method, full.optimizer, full.ema, full.epochs) == ("full", "adamw", None, 100)
    assert full.search_lr == (5e-3, 1e-3, 5e-4, 1e-4)
    assert recipes.read([name, "method=full", "lr=0.007"]).lr == 0.007
    assert recipes.read([name, "method=gps"]) == recipes.read([name])
    own = tmp_path / "own.yaml"
    own.write_text("lr: 0.5\n")
    assert recipes.read([name, str(own), "method=bias"]).lr == 0.5
    methods = {path.stem for path in recipes.PEERS.glob("*.yaml")}
    assert methods == set(METHODS.present) - {"gps"}
    miniature("vtab/dtd", tmp_path, 16)
    for method in sorted(methods):
        recipe = recipes.read(["vtab/dtd", f"method={method}"], data=str(tmp_path))
        small = recipe.changed(model="timm:test_vit", image_size=32, epochs=1, pretrained=False, accelerator="cpu")
        small = small.changed(spt_budget=10_000, batch_size=16)
        assert fit(small, tmp_path / method).metrics["method"] == method
    assert len(steps) == 2 * (len(methods) - 1)  # the linear probe is fitted, not trained
    with pytest.raises(ConfigError, match="method"):
        recipes.read([name, "method=magic"])


def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.stdout
        return result.stdout

    listed = json.loads(run("recipes", "list", "--json"))
    assert [row["recipe"] for row in listed] == list(ROWS)
    assert "fgvc/stanford-cars-convnext_b" in run("recipes", "list")
    assert run("recipes", "show", "vtab/kitti") == recipes.recipe_file("vtab/kitti").read_text(encoding="utf-8")
    miniature("vtab/kitti", tmp_path, 16)
    out = tmp_path / "run"
    small = ("model=timm:test_vit", "image_size=32", "epochs=1", "pretrained=false", "accelerator=cpu")
    got = json.loads(run("fit", "vtab/kitti", "--data", tmp_path, "--out", out, "--json", *small))
    assert got["data"] == f"task:vtab-kitti?root={tmp_path}"
    tested = json.loads(
        run("evaluate", "--delta", out / "delta.safetensors", "--data", got["data"], "--accelerator", "cpu", "--json")
    )
    assert tested["accuracy"]["value"] == got["test"]["accuracy"]["value"]


def test_wheel_holds_the_recipes(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).resolve().parents[2]
    builder = hatchling.WheelBuilder(str(root))
    held = {Path(file.distribution_path) for file in builder.recurse_included_files()}
    assert {Path("fewtune/recipes") / f"{name}.yaml" for name in recipes.names()} <= held
    assert Path("fewtune/recipes/peers/full.yaml") in held
