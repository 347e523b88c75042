"""The search: what is tried, what ends early, a time budget, and a study that goes on where it was killed."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import fewtune
from fewtune.cli import main
from fewtune.cli.fit import seconds
from fewtune.config import read_recipe
from fewtune.errors import ConfigError, MissingExtra
from fewtune.tasks import fit
from fewtune.training.study import Space, Study
from fewtune.training.trial import Judge
from runs import arguments, coloured_folder, tiny_recipe

optuna = pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "search.csv").open() as file:
        return list(csv.DictReader(file))


def trials_of(folder: Path) -> list[tuple[Any, ...]]:
    """What came of every trial that ended, as Optuna itself reads it."""
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'search.db'}")
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    trials = study.get_trials(states=states)
    return [(trial.params, trial.state, trial.value, trial.intermediate_values) for trial in trials]


def test_listed_learning_rates_come_first_each_with_another_k() -> None:
    space = Space((1e-3, 1e-2, 1e-1), (1.0, 5.0), (0.0, 0.1))
    assert space.size == 12
    assert space.first == [
        {"lr": 1e-3, "k": 1.0, "drop_path": 0.0},
        {"lr": 1e-2, "k": 5.0, "drop_path": 0.1},
        {"lr": 1e-1, "k": 1.0, "drop_path": 0.0},
    ]
    assert set(Space((1e-3,)).distributions()) == {"lr"}


def test_it_scores_once_and_trains_with_the_best(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return fewtune.gradient_importance(*arguments, **options)

    monkeypatch.setattr("fewtune.methods.criteria.gradient_importance", counted)
    recipe = tiny_recipe(images, epochs=2, search_lr=[1e-6, 1e-2], search_k=[1, 3], search_epochs=2)
    result = fit(recipe, tmp_path / "run", search=True)
    assert len(calls) == 2  # once for all trials of the search, and once for the run with the best
    chosen, rows = read_recipe([result.folder.config]), rows_of(tmp_path / "run")
    assert [(float(row["lr"]), float(row["k"])) for row in rows[:2]] == [(1e-6, 1), (1e-2, 3)]
    assert len(rows) == 4
    assert all(1e-6 <= float(row["lr"]) <= 1e-2 for row in rows)
    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert (chosen.lr, chosen.k, chosen.epochs) == (float(best["lr"]), float(best["k"]), 2)
    assert fewtune.Selection.load(result.folder.selection).connections == chosen.k * 3136
    monkeypatch.setattr("fewtune.methods.criteria.gradient_importance", pytest.fail)
    assert fit(recipe, tmp_path / "run", resume=True, search=True).metrics == result.metrics


def test_trials_that_were_left_behind_are_the_next(tmp_path: Path) -> None:
    """Of three at a time; the listed rates come before what is drawn, each once."""
    space = Space((1e-4, 1e-3, 1e-2, 1e-1), (1.0, 2.0))
    study = Study(tmp_path / "search.db", space, 0)
    asked = [study.ask() for _ in range(5)]
    study.tell(asked[2], 0.5, pruned=False, val_loss=1.0)
    assert [trial.params for trial in asked[:4]] == space.first
    again = Study(tmp_path / "search.db", space, 0)
    left = [again.ask() for _ in range(4)]
    assert [trial.params for trial in left] == [asked[number].params for number in (0, 1, 3, 4)]
    assert again.ask().params not in [trial.params for trial in asked]
    assert [trial.params for trial in again.done] == [asked[2].params]


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_to_the_same_trials(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = tiny_recipe(
        images, epochs=1, search_lr=[1e-4, 1e-2], search_k=[1, 2], search_epochs=3, search_trials=6, lr=3e-3
    )  # fmt: skip
    whole = fit(recipe, tmp_path / "whole", search=True)
    trials = trials_of(tmp_path / "whole")
    assert len(trials) == 6
    assert len({trial[0]["lr"] for trial in trials}) == 6  # beyond the two that are listed

    judged, epochs = Judge.on_train_epoch_end, []

    def killing(self: Judge, *arguments: Any) -> None:
        judged(self, *arguments)
        epochs.append(None)
        if len(epochs) in (4, 8):  # within the second trial, and within a later one of the part that goes on
            raise Killed

    monkeypatch.setattr(Judge, "on_train_epoch_end", killing)
    with pytest.raises(Killed):
        fit(recipe, tmp_path / "cut", search=True)
    assert not (tmp_path / "cut" / "config.yaml").exists()
    with pytest.raises(ConfigError, match=r"other settings.*lr was 0.003 and is 0.002"):
        fit(recipe.changed(lr=2e-3), tmp_path / "cut", resume=True, search=True)
    with pytest.raises(ConfigError, match="is not empty"):
        fit(recipe, tmp_path / "cut", search=True)
    with pytest.raises(Killed):
        fit(recipe, tmp_path / "cut", resume=True, search=True)
    result = fit(None, tmp_path / "cut", resume=True)  # the folder knows that a search was going on
    assert trials_of(tmp_path / "cut") == trials
    assert result.metrics["validation"] == whole.metrics["validation"]
    assert (tmp_path / "cut/delta.safetensors").read_bytes() == (tmp_path / "whole/delta.safetensors").read_bytes()


def test_a_hopeless_trial_ends_early_and_is_never_chosen(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    judged = Judge.on_train_epoch_end

    def curve(self: Judge, trainer: Any, module: Any) -> None:
        """A rate of 1e-5 is far behind the others, until an end that nobody sees."""
        late = module.current_epoch == trainer.max_epochs - 1
        poor = module.recipe.lr == 1e-5 and not late
        module.history[-1]["val_accuracy"] = 0.1 if poor else 0.5
        judged(self, trainer, module)

    monkeypatch.setattr(Judge, "on_train_epoch_end", curve)
    recipe = tiny_recipe(images, epochs=1, search_lr=[1e-3, 1e-2, 1e-5], search_k=[1], search_epochs=4)
    fit(recipe, tmp_path / "run", search=True)
    rows = rows_of(tmp_path / "run")
    assert [(row["state"], row["epochs"]) for row in rows] == [("complete", "4"), ("complete", "4"), ("pruned", "2")]
    assert read_recipe([tmp_path / "run/config.yaml"]).lr != 1e-5


def test_a_loss_that_becomes_infinite_counts_as_nothing(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, epochs=1, search_lr=[1e30, 1e-3], search_k=[1], search_epochs=2, optimizer="sgd")
    fit(recipe, tmp_path / "run", search=True)
    first, second = rows_of(tmp_path / "run")
    assert (float(first["val_accuracy"]), first["val_loss"]) == (0.0, "")
    assert float(second["val_accuracy"]) > 0
    assert read_recipe([tmp_path / "run/config.yaml"]).lr == 1e-3


def test_a_time_budget_ends_it_and_one_trial_is_always_complete(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, epochs=1, search_lr=[1e-3, 1e-2], search_k=[1], search_epochs=2, search_seconds=1e-3)
    result = fit(recipe, tmp_path / "run", search=True)
    assert [row["state"] for row in rows_of(tmp_path / "run")] == ["complete"]
    assert read_recipe([result.folder.config]).lr == 1e-3


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), (" 2 min ", 120)])
def test_times(text: str, value: float) -> None:
    assert math.isclose(seconds(text), value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--time", "5min"], "give --search too"),
        (["--search", "--time", "soon"], "such as 90s, 20min or 1.5h; got 'soon'"),
        (["--on", "ray"], "give --search too"),
        (["--search", "--on", "slurm"], "local, ray or ray://HOST:PORT, got 'slurm'"),
        (["--search", "method=linear"], "no learning rate or K to search"),
    ],
)
def test_wrong_calls_end_in_one_line(
    extra: list[str], words: str, images: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["fewtune", "fit", *arguments(images), *extra, "--out", str(tmp_path / "wrong")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("library", "extra"), [("optuna", "search"), ("ray", "ray")])
def test_without_a_library_its_extra_is_named(
    library: str, extra: str, images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"fewtune\[{extra}\]"):
        fit(tiny_recipe(images), tmp_path / "without", search=True, on="local" if library == "optuna" else "ray")
    assert not (tmp_path / "without").exists()
