"""Images of any number of classes, from the CSV file to the task file, the report, the bench and the service."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from fewtune.cli.app import app
from fewtune.config import recipe_from
from fewtune.errors import ConfigError, DataError
from fewtune.methods import load_task_file
from fewtune.multilabel.metrics import best_thresholds
from fewtune.multilabel.work import prepare
from fewtune.report import write_report
from fewtune.serving.opening import open_bank
from fewtune.tasks import compare, evaluate, fit, load_task, predict
from fewtune.training.fit import Result
from mosaics import ARCHIVE, write_mosaics
from runs import coloured_folder, tiny_recipe
from several import COLOURS, coloured_squares

SETTINGS: dict[str, Any] = {"task": "multi-label", "lr": 0.01, "epochs": 6, "batch_size": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("several")
    return fit(tiny_recipe(coloured_squares(root / "data"), **SETTINGS), root / "run")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_run_learns_and_says_what_it_measured(run: Result) -> None:
    test = run.metrics["test"]
    rows = rows_of(run.folder.predictions)
    chance = sum(test["support"]) / len(rows) / 3
    assert test["images"] == len(rows) == 15
    assert test["map"]["value"] > chance + 0.2
    assert sum(float(row["f1"]) for row in rows) / 15 == pytest.approx(test["f1_images"]["value"], abs=1e-6)
    assert set(run.metrics["validation"]) == {"epoch", "loss", "map"}
    assert {row["labels"] for row in rows} > {"", "red"} or any(";" in row["labels"] for row in rows)


def test_thresholds_are_chosen_on_validation_images_and_lie_in_the_task_file(run: Result) -> None:
    work = prepare(recipe_from(load_task_file(run.folder.delta).metadata["recipe"]))
    tuned = load_task(run.folder.delta)
    got = [
        (tuned.backbone.model(image[None]), label)
        for image, label in map(work.evaluated(work.data.val).__getitem__, range(len(work.data.val)))
    ]
    scores = torch.cat([logits for logits, _ in got]).detach().sigmoid()
    labels = torch.stack([label for _, label in got])
    recorded = load_task_file(run.folder.delta).metadata["thresholds"]
    assert recorded == pytest.approx(best_thresholds(scores, labels), abs=1e-4)
    assert list(run.metrics["test"]["thresholds"]) == recorded
    for row in rows_of(run.folder.predictions):
        told = [
            name for name, least in zip(sorted(COLOURS), recorded, strict=True) if float(row[f"p({name})"]) >= least
        ]
        assert row["predictions"] == ";".join(told)


def test_evaluate_scores_the_same_test_images_again(run: Result, tmp_path: Path) -> None:
    data = run.metrics["data"]
    got = evaluate(run.folder.delta, data, accelerator="cpu")
    test = got.to_json()
    assert test.pop("data")["split_again"]["test_fraction"] == 0.25
    assert test.keys() == run.metrics["test"].keys()
    for key, value in test.items():
        assert value == pytest.approx(run.metrics["test"][key], abs=1e-4) or isinstance(value, list), key
    assert got.tables()[1][0].keys() >= {"average precision", "threshold"}
    apart = evaluate(run.folder.delta, data, accelerator="cpu", include_training=True).to_json()
    assert apart["training_images"]["images"] == 45


def test_predict_needs_no_labels_and_one_bad_image_loses_no_other(run: Result, tmp_path: Path) -> None:
    images = sorted(Path(run.metrics["data"]).parent.glob("*.png"))[:4]
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = predict(run.folder.delta, [*images, tmp_path / "bad.png"], accelerator="cpu", strict=False)
    assert [bool(row["error"]) for row in rows] == [False] * 4 + [True]
    assert rows[0].keys() == {"file", "predictions", "p(blue)", "p(green)", "p(red)", "error"}
    known = {row["file"]: row for row in rows_of(run.folder.predictions)}
    for image in predict(
        run.folder.delta, [Path(run.metrics["data"]).parent / name for name in known], accelerator="cpu"
    ):
        assert image["predictions"] == known[Path(image["file"]).name]["predictions"]


def test_two_runs_are_compared_and_reported(run: Result, tmp_path: Path) -> None:
    recipe = tiny_recipe(run.metrics["data"], **SETTINGS | {"method": "linear", "epochs": 2})
    other = fit(recipe, tmp_path / "linear")
    got = compare(other.folder.predictions, run.folder.predictions)
    gap = run.metrics["test"]["map"]["value"] - other.metrics["test"]["map"]["value"]
    assert got.differences["map"].value == pytest.approx(gap, abs=1e-5)
    page = write_report([run.folder.path], tmp_path / "one.html").read_text()
    assert "mean average precision" in page
    assert "The worst images" in page
    assert "F1" in write_report([other.folder.path, run.folder.path], tmp_path / "two.html").read_text()


def test_a_service_answers_with_the_labels_that_hold(run: Result, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "squares.safetensors").write_bytes(run.folder.delta.read_bytes())
    opened = open_bank(tmp_path / "tasks")
    images = sorted(Path(run.metrics["data"]).parent.glob("*.png"))[:6]
    rows = predict(run.folder.delta, images, accelerator="cpu")
    from fewtune.data.images import open_image

    batch = torch.stack([opened.prepare("squares", open_image(image)) for image in images])
    for answer, row in zip(opened.bank.predict(batch, "squares"), rows, strict=True):
        assert answer.probabilities == pytest.approx({name: row[f"p({name})"] for name in sorted(COLOURS)}, abs=1e-4)
        assert set(answer.labels) == set(filter(None, row["predictions"].split(";")))
        assert list(answer.labels.values()) == sorted(answer.labels.values(), reverse=True)


def test_the_bench_keeps_its_measure(run: Result, tmp_path: Path) -> None:
    from fewtune.bench.plan import Run
    from fewtune.bench.record import record_of

    recipe = recipe_from(load_task_file(run.folder.delta).metadata["recipe"])
    planned = Run("train", "several", "gps", 0)
    shutil.copytree(run.folder.path, tmp_path / planned.name)
    record = record_of(planned, recipe, tmp_path)
    assert record.metrics is not None
    assert record.metrics["test"]["map"] == {"value": run.metrics["test"]["map"]["value"]}
    assert record.by_image is None


def test_what_does_not_fit_is_said(run: Result, tmp_path: Path) -> None:
    several, one = run.metrics["data"], coloured_folder(tmp_path / "one", each=4)
    with pytest.raises(DataError, match="add task=multi-label"):
        fit(tiny_recipe(several), tmp_path / "run")
    with pytest.raises(DataError, match="leave task=multi-label out"):
        fit(tiny_recipe(one, task="multi-label"), tmp_path / "run")
    with pytest.raises(DataError, match="leave task=multi-label out"):
        evaluate(run.folder.delta, str(one), accelerator="cpu")
    with pytest.raises(ConfigError, match="mixup, class_weights"):
        tiny_recipe(several, task="multi-label", mixup=0.2, class_weights="balanced")
    assert not (tmp_path / "run").exists()


def test_from_the_shell(run: Result, capsys: pytest.CaptureFixture[str]) -> None:
    app(["evaluate", "--delta", str(run.folder.delta), "--data", run.metrics["data"]], standalone_mode=False)
    said = capsys.readouterr().out
    assert "mean average precision, 95 % interval" in said
    image = str(Path(run.metrics["data"]).parent / "000.png")
    app(["predict", "--delta", str(run.folder.delta), image, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)[0]["predictions"] is not None


def test_what_lies_below_the_reach_is_kept_with_every_label(run: Result, tmp_path: Path) -> None:
    settings = SETTINGS | {"reach": 2, "epochs": 2, "limit_train": 24}
    plain = fit(tiny_recipe(run.metrics["data"], **settings), tmp_path / "plain")
    kept = fit(tiny_recipe(run.metrics["data"], **settings, keep_prefix="float32"), tmp_path / "kept")
    assert kept.metrics["validation"]["map"] == pytest.approx(plain.metrics["validation"]["map"], abs=1e-3)


@pytest.mark.parametrize("objective", ["supcon", "cross_entropy"])
def test_both_objectives_select(run: Result, objective: str) -> None:
    from fewtune.training.tuners import score

    work = prepare(tiny_recipe(run.metrics["data"], **SETTINGS, objective=objective, limit_train=32))
    scores = score(work)
    assert all(bool(values.isfinite().all()) for values in scores.values())
    assert any(bool((values != 0).any()) for values in scores.values())


@pytest.mark.data
def test_on_mosaics_of_eurosat_the_measures_are_scikit_learn_s_and_torchmetrics(tmp_path: Path) -> None:
    if not ARCHIVE.exists():
        pytest.skip(f"EuroSAT is not at {ARCHIVE}; FEWTUNE_TEST_DATA says where")
    data = write_mosaics(tmp_path / "mosaics", train=60, test=40) / "list.csv"
    settings = {**SETTINGS, "epochs": 2, "test_fraction": None, "method": "bias"}
    run = fit(tiny_recipe(data, **settings), tmp_path / "run")
    rows, test = rows_of(run.folder.predictions), run.metrics["test"]
    names = test["class_names"]
    truth = np.array([[name in row["labels"].split(";") for name in names] for row in rows], dtype=int)
    got = np.array([[float(row[f"p({name})"]) for name in names] for row in rows])
    hits = np.array([[name in row["predictions"].split(";") for name in names] for row in rows], dtype=int)
    present = truth.any(0)
    expected = average_precision_score(truth[:, present], got[:, present], average="macro")
    assert test["map"]["value"] == pytest.approx(expected, abs=1e-4)  # probabilities are written with six digits
    assert test["f1_micro"] == pytest.approx(f1_score(truth, hits, average="micro"))
    assert test["f1_images"]["value"] == pytest.approx(f1_score(truth, hits, average="samples", zero_division=1))
    scores, labels = torch.from_numpy(got[:, present]), torch.from_numpy(truth[:, present])
    theirs = MultilabelAveragePrecision(int(present.sum()), average="macro")(scores, labels)
    assert test["map"]["value"] == pytest.approx(float(theirs), abs=1e-4)
    theirs = MultilabelF1Score(int(present.sum()), average="macro")(torch.from_numpy(hits[:, present]), labels)
    assert test["f1"]["value"] == pytest.approx(float(theirs))
