"""Training on training and validation images: which images, which epoch, which learning rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewtune.bench.job import Job, do
from fewtune.errors import ConfigError
from fewtune.methods.linear import REGULARISATION
from fewtune.tasks import evaluate, fit, prepare
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def _history(folder: Any) -> list[dict[str, float]]:
    return json.loads(folder.history.with_suffix(".json").read_text())


def test_all_images_but_the_tests_are_trained_on(images: Path) -> None:
    apart, together = (prepare(tiny_recipe(images, train_on=on)).data for on in ("train", "train+val"))
    assert apart.val is not None
    assert together.val is None
    assert sorted(together.train.names) == sorted([*apart.train.names, *apart.val.names])
    labels = dict(zip([*apart.train.names, *apart.val.names], [*apart.train.labels, *apart.val.labels], strict=True))
    assert dict(zip(together.train.names, together.train.labels, strict=True)) == labels
    assert together.test is not None
    assert apart.test is not None
    assert together.test.names == apart.test.names
    assert not set(together.train.names) & set(together.test.names)


def test_the_last_epoch_is_kept_also_where_weights_are_averaged(images: Path, tmp_path: Path) -> None:
    """The task file is what the checkpoint's last values are, or with averaging the averaged ones."""
    for ema in (None, 0.8):
        result = fit(tiny_recipe(images, train_on="train+val", method="bias", ema=ema, lr=1e-2), tmp_path / str(ema))
        state = torch.load(result.folder.checkpoint, weights_only=True)
        kept = state["fewtune"]["best"]
        assert result.metrics["validation"] == {"epoch": 2}
        assert "val_accuracy" not in _history(result.folder)[0]
        last = {**state["state_dict"]["values"]}
        same = [torch.equal(kept["state"]["values"][name], value) for name, value in last.items()]
        assert all(same) is (ema is None)
        if ema is not None:
            averages = state["fewtune"]["average"]["values"]
            assert all(torch.equal(a, b) for a, b in zip(averages, kept["state"]["values"].values(), strict=True))
        got = evaluate(result.folder.delta, str(images), test_fraction=0.25)
        assert got.report.to_json() == result.metrics["test"]


def test_stopping_early_follows_the_schedule_of_all_epochs(images: Path, tmp_path: Path) -> None:
    """The first epochs of a run that is stopped are those of the run that is not."""
    whole = fit(tiny_recipe(images, method="bias", epochs=5), tmp_path / "whole")
    part = fit(tiny_recipe(images, method="bias", epochs=5, stop_after=2), tmp_path / "part")
    first, second = (_history(result.folder) for result in (whole, part))
    assert len(second) == 2
    for one, other in zip(first, second, strict=False):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    with pytest.raises(ConfigError, match="must not be larger than epochs, 5"):
        tiny_recipe(images, epochs=5, stop_after=6)


def test_a_killed_run_without_validation_goes_on(images: Path, tmp_path: Path) -> None:
    """Its checkpoint after the second epoch, then the rest."""
    recipe = tiny_recipe(images, method="bias", train_on="train+val", epochs=4)
    whole = fit(recipe, tmp_path / "whole")
    fit(recipe.changed(stop_after=2), tmp_path / "part")
    config = tmp_path / "part" / "config.yaml"
    config.write_text(config.read_text().replace("stop_after: 2", "stop_after: null"))
    (tmp_path / "part" / "metrics.json").unlink()
    again = fit(recipe, tmp_path / "part", resume=True)
    assert again.folder.delta.read_bytes() == whole.folder.delta.read_bytes()
    assert len(_history(again.folder)) == 4


def test_a_choosing_run_is_judged_by_all_its_epochs_the_last_or_the_best(images: Path, tmp_path: Path) -> None:
    recipe, judged = tiny_recipe(images, method="bias", lr=1e-2), {}
    for epochs in ("all", "last", "best"):
        job = Job("choose", f"a/b/choose/{epochs}/seed-0", recipe, tmp_path, epochs)
        assert do(job) is None
        judged[epochs] = json.loads((job.folder / "validation.json").read_text())["candidates"]
    assert [one["setting"] for one in judged["all"]] == [{"stop_after": n} for n in (1, 2, 3)]
    best = max(judged["all"], key=lambda one: (one["accuracy"], -one["loss"]))
    assert judged["last"] == [{**judged["all"][-1], "setting": {}}]
    assert judged["best"] == [{**best, "setting": {}}]


def test_where_the_probe_has_its_regularisation_from(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, method="linear", train_on="train+val")
    held_back = fit(recipe, tmp_path / "held-back").metrics["validation"]  # a fifth of the training images chose it
    assert held_back.keys() == {"regularisation"}
    assert held_back["regularisation"] in REGULARISATION
    result = fit(recipe.changed(regularisation=0.1), tmp_path / "with")
    assert result.metrics["validation"] == {"regularisation": 0.1}
    chosen = fit(recipe.changed(train_on="train"), tmp_path / "chosen").metrics["validation"]
    assert chosen["accuracy"] == max(chosen["tried"].values())
    equal = [c for c, accuracy in chosen["tried"].items() if accuracy == chosen["accuracy"]]
    assert f"{chosen['regularisation']:g}" == min(equal, key=lambda c: chosen["losses"][c])


def test_a_search_needs_validation_images(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave train_on=train\+val out"):
        fit(tiny_recipe(images, train_on="train+val"), tmp_path / "run", search=True)
