"""The page of the ablations says what the runs' files say, and keeps the reading that was written by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLASSES = ("can", "jar")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations_page

    return ablations_page


def _run(folder: Path, probabilities: list[float]) -> None:
    """A finished run on images of the first class, each given this probability of it."""
    folder.mkdir(parents=True)
    hits = [p > 0.5 for p in probabilities]
    test = {"images": len(hits), "accuracy": {"value": sum(hits) / len(hits)}}
    metrics = {"test": test, "validation": {"accuracy": 0.5}, "trained": 1234, "percent_of_backbone": 0.5, "seconds": 9}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with (folder / "test_predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "label", "prediction", "p(can)", "p(jar)"])
        writer.writeheader()
        for i, p in enumerate(probabilities):
            values = {"p(can)": p, "p(jar)": 1 - p, "prediction": CLASSES[p <= 0.5]}
            writer.writerow({"file": f"{i}.jpg", "label": "can", **values})


@pytest.fixture
def out(page: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for seed in (0, 1):
        _run(folder / f"trashnet-{seed}-gps", [0.9, 0.9, 0.9, 0.2])
        _run(folder / f"trashnet-{seed}-layer", [0.9, 0.9, 0.4 - 0.1 * seed, 0.2])
    _run(folder / "trashnet-0-oracle", [0.9, 0.9, 0.9, 0.8])
    _run(folder / "trashnet-2-net-random", [0.2, 0.2, 0.2, 0.2])
    _run(folder / "trashnet-0-full", [0.9, 0.9, 0.9, 0.9])
    _run(folder / "trashnet-0-k5", [0.9, 0.9, 0.9, 0.6])
    for name in ("gps", "full"):
        _run(folder / f"flowers-4shot-0-{name}", [0.9, 0.9, 0.9, 0.2])
    for group in ("gps", "gps-many", "full"):
        (folder / f"rate-{group}.json").write_text('{"lr": 0.002, "tried": [{"lr": 0.002, "val_accuracy": 0.5}]}')
    return folder


def test_differences_are_paired_by_image_and_seed(page: Any, out: Path) -> None:
    found = page.figures(out)
    rows = found["trials"]
    assert rows["gps"]["accuracy"] == [0.75, 0.75]
    assert "accuracy_difference" not in rows["gps"]
    layer = rows["layer"]
    assert (layer["seeds"], layer["common_seeds"], layer["difference_by_seed"]) == ([0, 1], 2, [-0.25, -0.25])
    assert layer["accuracy_difference"][0] == -0.25
    nats = [math.log(0.9) - math.log(p) for p in (0.4, 0.3)]
    assert layer["loss_difference"][0] == pytest.approx(sum(nats) / 2 / 4)
    assert layer["loss"][1] == pytest.approx(-(2 * math.log(0.9) + math.log(0.3) + math.log(0.2)) / 4)
    oracle = rows["oracle"]
    assert (oracle["common_seeds"], oracle["accuracy_difference"][0]) == (1, 0.25)
    low, high = oracle["accuracy_difference"][1:]
    assert low <= 0.25 <= high
    assert "common_seeds" not in rows["net-random"]  # no run of GPS on those images
    assert found["few_shot"]["4"]["full"]["accuracy_difference"][0] == 0
    assert "magnitude" in found["not_run"]["trashnet-0"]
    assert "gps" not in found["not_run"]["trashnet-0"]


def test_the_page_is_made_of_the_figures_and_keeps_its_reading(page: Any, out: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    page.write_page(out, docs)
    text = (docs / "ablations.md").read_text()
    assert "| by layer | 1,234 | 0.50 | 0.002 | 50.0 ± 0.0 (2) | -25.0 (" in text
    assert "| full fine-tuning |" in text
    assert "head-ce" in text.split("## Not run")[1]
    assert text.rstrip().endswith("Not yet written.")
    assert max(map(len, text.split("## Not run")[0].splitlines())) < 200
    assert json.loads((docs / "ablations.json").read_text())["trials"]["oracle"]["accuracy"] == [1.0]
    for name in ("differences", "amount", "few-shot"):
        assert (docs / f"ablations-{name}.png").stat().st_size > 5000
    (docs / "ablations.md").write_text(text.replace("Not yet written.", "All of it, and none."))
    page.write_page(out, docs)
    assert (docs / "ablations.md").read_text() == text.replace("Not yet written.", "All of it, and none.")
