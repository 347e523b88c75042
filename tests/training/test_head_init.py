"""Runs that start from the converged linear probe."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewtune
from fewtune.bench.job import Job, do
from fewtune.bench.plan import scores_file
from fewtune.errors import ConfigError
from fewtune.methods import METHODS
from fewtune.methods.linear import Features, fit_probe, held
from fewtune.tasks import fit, prepare
from fewtune.training.learner import BEFORE
from fewtune.training.run_folder import RunFolder
from fewtune.training.search import search_recipe
from fewtune.training.tuners import Share, score
from fewtune.training.work import Work
from runs import coloured_folder, tiny_recipe
from stopping import Stop


@pytest.fixture(scope="module", autouse=True)
def _two_strengths() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewtune.methods.linear.REGULARISATION", (1e-3, 1e1))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def linear(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit(tiny_recipe(images, method="linear"), tmp_path_factory.mktemp("runs") / "linear")


def hits(file: Path) -> dict[str, bool]:
    with file.open(newline="") as lines:
        return {row["file"]: row["label"] == row["prediction"] for row in csv.DictReader(lines)}


def test_training_begins_at_the_probe_and_says_what_it_brought(images: Path, linear: Any, tmp_path: Path) -> None:
    result = fit(tiny_recipe(images, head_init="probe", lr=5e-3), tmp_path / "run")
    start = result.metrics["start"]
    assert start["validation"]["accuracy"] == linear.metrics["validation"]["accuracy"]
    assert start["accuracy"] == linear.metrics["test"]["accuracy"]
    before, now = hits(linear.folder.predictions), hits(result.folder.predictions)
    assert start["gain"]["value"] == pytest.approx(sum(now[name] - before[name] for name in before) / len(before))
    assert result.metrics["validation"]["accuracy"] >= start["validation"]["accuracy"]


def test_the_probe_is_kept_where_nothing_better_comes(images: Path, linear: Any, tmp_path: Path) -> None:
    """At a rate at which every epoch ruins the model the run is the probe: bit for bit, but for what is never moved."""
    result = fit(tiny_recipe(images, head_init="probe", lr=3.0), tmp_path / "run")
    assert result.metrics["validation"]["epoch"] == BEFORE
    assert result.metrics["start"]["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0, "level": 0.95}
    probe, kept = (fewtune.load_delta(run.folder.delta).values for run in (linear, result))
    assert all(torch.equal(kept[name], value) for name, value in probe.items())
    assert hits(result.folder.predictions) == hits(linear.folder.predictions)


def test_an_interrupted_run_goes_on_from_the_same_probe(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(images, head_init="probe", lr=5e-3)
    whole = fit(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "parts", callbacks=[Stop(2)])
    with monkeypatch.context() as patch:
        patch.setattr("fewtune.classification.work.probe_head", None)  # it is not fitted again
        parts = fit(recipe, tmp_path / "parts", resume=True)
    assert parts.metrics["start"] == whole.metrics["start"]
    assert parts.metrics["test"] == whole.metrics["test"]


@pytest.fixture
def probed(images: Path) -> dict[str, torch.Tensor]:
    """Scores of cross-entropy through the converged probe, with the probe put into the head by hand."""
    from fewtune.data.transforms import two_views
    from fewtune.training.loaders import image_loader

    work = prepare(tiny_recipe(images))
    model = work.backbone.model
    METHODS["linear"].fit.run(Share(work, torch.device("cpu"))).tuner.detach(keep=True)  # type: ignore[union-attr]
    views = work.data.train.with_transform(two_views(work.backbone))
    loader = image_loader(views, 8, seed=0, shuffle=True)
    return dict(
        fewtune.gradient_importance(model, [(x, y) for x, y, _ in loader], fewtune.CrossEntropy(), work.backbone.head)
    )


def test_cross_entropy_scores_through_the_probe(images: Path, probed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    recipe = tiny_recipe(images, head_init="probe", objective="cross_entropy", epochs=1)
    scores = score(prepare(recipe))
    fresh = score(prepare(recipe.changed(head_init="random")))
    for name, value in probed.items():
        assert torch.allclose(scores[name], value, atol=1e-6)
        assert not torch.allclose(fresh[name] / fresh[name].max(), value / value.max(), atol=1e-2)
    expected = fewtune.select(scores, k=1)
    assert fewtune.Selection.load(fit(recipe, tmp_path / "run").folder.selection) == expected
    assert fewtune.select(fresh, k=1) != expected


def test_the_bench_scores_through_the_probe_and_shares_no_scores_of_another_head(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, head_init="probe", objective="cross_entropy", epochs=1, train_on="train+val")
    job = Job("train", "images/gps/seed-0", recipe, tmp_path, "last")
    assert do(job) is None
    assert fewtune.Selection.load(RunFolder(job.folder).selection) == fewtune.select(score(prepare(recipe)), k=1)
    fresh = recipe.changed(head_init="random")
    assert scores_file(fresh, tmp_path) != scores_file(recipe, tmp_path)
    contrasted = [r.changed(objective="supcon") for r in (recipe, fresh)]  # features alone: the head is not looked at
    assert scores_file(contrasted[0], tmp_path) == scores_file(contrasted[1], tmp_path)


def test_a_search_begins_every_trial_at_the_probe(images: Path, linear: Any, tmp_path: Path) -> None:
    """At rates at which every epoch ruins the model a trial is as good as the probe."""
    recipe = tiny_recipe(images, head_init="probe", search_lr=[3.0], search_k=[1], search_epochs=1, search_trials=1)
    rows = search_recipe(prepare(recipe), tmp_path / "search.db").rows
    assert [row["val_accuracy"] for row in rows] == [linear.metrics["validation"]["accuracy"]]


def test_without_validation_images_the_last_epoch_counts(images: Path, tmp_path: Path) -> None:
    result = fit(tiny_recipe(images, head_init="probe", train_on="train+val", epochs=1), tmp_path / "run")
    assert result.metrics["start"]["validation"] == {}
    assert result.metrics["validation"] == {"epoch": 0}
    assert "gain" in result.metrics["start"]


def test_a_fifth_is_held_back_to_choose_the_regularisation() -> None:
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(5)[labels]
    features = Features(inputs, labels)
    part, back = held(features)
    assert (len(part.labels), len(back.labels)) == (48, 12)
    assert back.labels.bincount().tolist() == [4, 4, 4]
    probe = fit_probe(features, None, 3)
    assert probe.regularisation == fit_probe(part, back, 3).regularisation
    again = fit_probe(features, None, 3, probe.regularisation)
    assert torch.equal(probe.weight, again.weight)
    assert probe.validation == {}


@pytest.mark.parametrize(("method", "why"), [("linear", "it is the probe"), ("vpt-deep", "what the head is given")])
def test_methods_that_cannot(images: Path, method: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot start from the linear probe.*{why}"):
        tiny_recipe(images, head_init="probe", method=method)


@pytest.fixture(scope="module")
def prepared(images: Path) -> Work:
    return prepare(tiny_recipe(images))


EPOCHS = [name for name, method in METHODS.present.items() if method.trains_by_epochs("classification")]


@pytest.mark.parametrize("method", EPOCHS)
def test_what_starts_plain_predicts_what_the_plain_model_does(prepared: Work, method: str) -> None:
    work = prepared.renewed(prepared.recipe.changed(method=method))
    pixels = torch.rand(4, 3, 32, 32)
    model = work.backbone.model.eval()
    with torch.no_grad():
        plain = model(pixels)
        run, value = Share(work, torch.device("cpu")), METHODS[method]
        value.attach(run, None if value.prepare is None else value.prepare(run, None))
        attached = model.eval()(pixels)
    assert torch.allclose(attached, plain, atol=1e-5) == value.starts_plain
