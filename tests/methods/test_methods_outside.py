"""A method and a criterion from outside the package: by entry points on the command line, and as plain values."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fewtune
from fewtune.config import read_recipe, recipe_from
from fewtune.errors import ConfigError
from fewtune.methods import CRITERIA, METHODS
from fewtune.methods.base import Run, Settings, selecting
from fewtune.neurons import Role, describe
from fewtune.selection import Selection
from fewtune.tasks import fit, prepare
from runs import arguments, coloured_folder, tiny_recipe
from runs import fewtune as command

MODULE = '''
"""A method that trains norms, and a criterion that looks at the spread of a layer's weights."""

from pydantic import Field

from fewtune import Scores, Selection
from fewtune.methods.base import Run, Settings, selecting
from fewtune.neurons import Role, describe


class NormSettings(Settings):
    norm_layers: int = Field(1, gt=0, description="how many norms, from the last")


def norms(run: Run) -> Selection:
    anatomy = describe(run.model, run.head)
    return Selection(anatomy, {}, {Role.NORM: anatomy.named(Role.NORM)[-2 * run.settings(NormSettings).norm_layers:]})


NORMS = selecting("norms", norms, NormSettings)


def spread(run: Run) -> Scores:
    anatomy = describe(run.model, run.head)
    weights = {name: run.model.get_parameter(name).detach() for name in anatomy.views}
    return Scores({name: (weight - weight.mean()).abs() for name, weight in weights.items()}, anatomy)
'''
ENTRY_POINTS = """
[fewtune.methods]
norms = outsider:NORMS
broken = outsider:NOTHING

[fewtune.criteria]
spread = outsider:spread
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which a package with a method and a criterion is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "outsider.py").write_text(MODULE)
    info = site / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def test_an_installed_method_works_through_the_command_line(
    images: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = command(
        "fit", *arguments(images, method="norms", norm_layers=2, epochs=1), "--out", run, "--json", env=installed
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trained"] == 2 * 2 * 64 + 3 * 65
    assert "norm_layers: 2" in (run / "config.yaml").read_text()
    inspected = command("delta", "inspect", run / "delta.safetensors")  # a task file needs no package of the method
    assert "method      norms" in inspected.stdout
    resumed = command("fit", "--resume", "--out", run, "--json", env=installed)
    assert json.loads(resumed.stdout)["trained"] == 2 * 2 * 64 + 3 * 65
    refused = command("fit", *arguments(images, method="norms", norm_layer=2), "--out", tmp_path / "x", env=installed)
    assert refused.returncode == 2
    assert "unknown key 'norm_layer' (did you mean 'norm_layers'?)" in refused.stderr
    unknown = command("fit", *arguments(images, method="norms"), "--out", tmp_path / "x")
    assert unknown.returncode == 2
    assert "there is no method 'norms'" in unknown.stderr


def test_an_installed_criterion_works_through_the_command_line(
    images: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "chosen.safetensors"
    done = command("select", *arguments(images, importance="spread", k=2), "--out", file, "--json", env=installed)
    assert done.returncode == 0, done.stderr
    selection = Selection.load(file)
    weight = prepare(tiny_recipe(images)).backbone.model.blocks[0].mlp.fc1.weight.detach()
    expected = (weight - weight.mean()).abs().topk(2, dim=1).indices.sort(1).values
    places = selection.places["blocks.0.mlp.fc1.weight"]
    assert torch.equal(places.flat.view(-1, 2) % places.fan_in, expected)
    assert json.loads(done.stdout)["connections"] == selection.connections > 0


def test_a_package_that_cannot_be_imported_is_one_line(images: Path, installed: dict[str, str], tmp_path: Path) -> None:
    done = command("fit", *arguments(images, method="broken"), "--out", tmp_path / "run", env=installed)
    assert done.returncode == 2
    assert "method 'broken' of outsider:NOTHING cannot be imported (AttributeError" in done.stderr
    assert done.stderr.strip().count("\n") == 0


class TokenSettings(Settings):
    """Of the method below."""

    tokens: bool = True


def tokens(run: Run) -> Selection:
    """The class token and its kin."""
    assert run.settings(TokenSettings).tokens
    anatomy = describe(run.model, run.head)
    return Selection(anatomy, {}, {Role.EMBEDDING: anatomy.named(Role.EMBEDDING)})


@pytest.fixture
def in_hand() -> Iterator[None]:
    """A method and a criterion put into the tables by a script."""
    METHODS["tokens"] = selecting("tokens", tokens, TokenSettings)
    CRITERIA["first"] = lambda run: fewtune.magnitude_importance(run.model, head=run.head)
    yield
    del METHODS["tokens"], CRITERIA["first"]


def test_plain_values_work_from_python(images: Path, tmp_path: Path, in_hand: None) -> None:
    recipe = tiny_recipe(images, method="tokens", epochs=1, tokens=True)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    fit(recipe, tmp_path / "run")
    assert read_recipe([tmp_path / "run/config.yaml"]) == recipe
    delta = fewtune.load_delta(tmp_path / "run/delta.safetensors")
    assert set(delta.whole) == {"cls_token", "pos_embed", "head.weight", "head.bias"}
    by_first = fit(tiny_recipe(images, importance="first", epochs=1), tmp_path / "first")
    by_magnitude = fit(tiny_recipe(images, importance="magnitude", epochs=1), tmp_path / "magnitude")
    chosen = [Selection.load(result.folder.selection) for result in (by_first, by_magnitude)]
    assert chosen[0] == chosen[1]


def test_an_unknown_criterion_names_the_nearest(images: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no criterion 'gradiant' \(did you mean 'gradient'\?\)"):
        recipe_from({"model": "timm:test_vit", "data": str(images), "importance": "gradiant"})


def test_recipes_and_the_table_of_methods_need_no_optional_library() -> None:
    lean = ["timm", "transformers", "peft", "lightning", "sklearn", "torchvision"]
    code = f"import sys, fewtune.config, fewtune.methods; print([n for n in {lean} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
