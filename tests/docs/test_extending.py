"""The examples of docs/extending.md, installed as a package beside fewtune: one of each kind of addition, and a run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fewtune
from fewtune.data import formats
from fewtune.kinds import KINDS
from fewtune.methods import CRITERIA
from fewtune.models import SOURCES, LoadOptions
from fewtune.neurons import LAYERS, ROLES
from fewtune.selection import Selection
from fewtune.tasks import fit, load_task, predict
from runs import coloured_folder, tiny_recipe

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
FILES = ("pairs", "lab", "grades", "gemm")
IMPORTS = """from fewtune import Scores
from fewtune.methods.base import Run
from fewtune.neurons import describe


"""


def block(begins: str) -> str:
    """The page's block of Python that begins so."""
    (text,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S) if text.startswith(begins)]
    return text


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with the page's examples and their entry points."""
    site = tmp_path / "site"
    information = site / "outsider-1.0.dist-info"
    information.mkdir(parents=True)
    for name in FILES:
        (site / f"{name}.py").write_text(block(f"# {name}.py"))
    (site / "mine.py").write_text(IMPORTS + block("def spread"))
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (points,) = [text for text in re.findall(r"```toml\n(.*?)```", PAGE, re.S) if "fewtune.sources" in text]
    (information / "entry_points.txt").write_text(
        re.sub(r'project\.entry-points\."(.*?)"', r"\1", points).replace('"', "")
    )
    monkeypatch.syspath_prepend(site)
    formats.outside_formats.cache_clear()
    yield
    formats.outside_formats.cache_clear()
    for table, name in ((KINDS, "grades"), (CRITERIA, "spread"), (SOURCES, "lab")):
        if name in table.present:
            del table[name]
    for listed in (LAYERS, ROLES):
        listed.pop("gemm.Gemm", None)


def test_a_format_a_source_a_task_and_a_criterion_in_one_run(installed: None, tmp_path: Path) -> None:
    images = coloured_folder(tmp_path / "images")
    files = sorted(images.glob("*/*.png"))
    lines = [f"{file.relative_to(images)} {file.parent.name}" for file in files]
    (images / "list.pairs").write_text("\n".join(lines))
    recipe = tiny_recipe(images / "list.pairs", model="lab:8", task="grades", importance="spread", k=2, epochs=1)
    assert recipe.objective == "distance"
    result = fit(recipe, tmp_path / "run")
    assert (result.metrics["task"], result.metrics["model"]) == ("grades", "lab:8")
    assert result.metrics["test"]["images"] == 9
    delta = tmp_path / "run/delta.safetensors"
    untouched = SOURCES["lab"].load("8", LoadOptions(num_classes=3)).model
    weight = untouched.get_parameter("body.2.weight").detach().flatten(1)
    places = Selection.load(result.folder.selection).places["body.2.weight"]
    assert torch.equal(places.flat.view(-1, 2) % 72, (weight - weight.mean()).abs().topk(2).indices.sort().values)
    assert load_task(delta).backbone.source == "lab:8"
    rows = predict(delta, files[:2])
    assert [row["prediction"].startswith("class") for row in rows] == [True, True]


def test_a_layer_kind(installed: None) -> None:
    gemm = importlib.import_module("gemm")
    model = nn.Sequential(gemm.Gemm(6, 4), nn.ReLU(), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    selection = fewtune.select(fewtune.magnitude_importance(model, head="2"), k=1)
    assert selection.places["0.weight"].fan_in == 6
    tuner = fewtune.attach(model, selection)
    optimiser = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(torch.rand(5, 6)).square().sum().backward()
    optimiser.step()
    tuner.sync()
    changed = model[0].weight.detach() != before
    assert changed.sum(0).max() == 1  # one connection of a neuron, which is a column
    assert (before.abs().argmax(0)[changed.any(0)] == changed.float().argmax(0)[changed.any(0)]).all()
    assert model[0].bias.requires_grad
