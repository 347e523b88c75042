"""Reports: they say what the run's files say, do without the images, and refuse what is no finished run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from browser import needs_browser, opened
from fewtune.errors import ConfigError
from fewtune.metrics import Interval, paired_bootstrap
from fewtune.report import write_report
from fewtune.report.findings import advice
from fewtune.report.page import difference, result
from fewtune.report.reading import read_run, told_apart
from fewtune.tasks import fit
from masks import mask_folder, tiny_mask_recipe
from runs import arguments, coloured_folder, fewtune, tiny_recipe


@dataclass(frozen=True)
class Runs:
    """Finished runs: two of the same images, and one of masks."""

    gps: Path
    bias: Path
    masks: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    data, masks = coloured_folder(root / "data"), mask_folder(root / "scenes", count=16)
    fit(tiny_recipe(data, epochs=3, warmup_epochs=1), root / "gps")
    fit(tiny_recipe(data, epochs=3, warmup_epochs=1, method="bias"), root / "bias")
    fit(tiny_mask_recipe(masks), root / "masks")
    return Runs(root / "gps", root / "bias", root / "masks")


def _visible(path: Path) -> str:
    """The page's words, without its markup."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", path.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_one_run_states_its_figures(runs: Runs, tmp_path: Path) -> None:
    page = write_report([runs.gps], tmp_path / "report.html")
    metrics, words = json.loads((runs.gps / "metrics.json").read_text()), _visible(page)
    accuracy = metrics["test"]["accuracy"]
    assert f"{100 * accuracy['value']:.1f} % of 9 test images are right" in words
    assert f"interval {100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}" in words
    assert f"{metrics['trained']:,}" in words
    for row in metrics["test"]["confusion"]:
        assert " ".join(map(str, row)) in words
    wrong = sum(sum(row) - row[i] for i, row in enumerate(metrics["test"]["confusion"]))
    assert page.read_text().count("data:image/jpeg") == wrong > 0
    assert page.stat().st_size < 5_000_000


def test_worst_class_first(runs: Runs, tmp_path: Path) -> None:
    test = json.loads((runs.gps / "metrics.json").read_text())["test"]
    words = _visible(write_report([runs.gps], tmp_path / "report.html"))
    rows = words[words.index("Test images by class") : words.index("Confusion matrix")]
    places = [rows.index(name) for name in test["class_names"]]
    recalls = [recall for _, recall in sorted(zip(places, test["recall"], strict=True))]
    assert recalls == sorted(recalls)


def test_without_images(runs: Runs, tmp_path: Path) -> None:
    moved = shutil.copytree(runs.gps, tmp_path / "run")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(re.sub(r"^data: .*$", "data: gone/photos", config, flags=re.M))
    page = write_report([moved], tmp_path / "report.html")
    assert "The images are not shown: " in _visible(page)
    assert "gone/photos" in _visible(page)
    assert "data:image" not in page.read_text()
    assert "data:image" not in write_report([runs.gps], tmp_path / "bare.html", pictures=False).read_text()


def test_masks(runs: Runs, tmp_path: Path) -> None:
    page = write_report([runs.masks], tmp_path / "report.html")
    test = json.loads((runs.masks / "metrics.json").read_text())["test"]
    assert f"the mean Dice is {100 * test['dice']['value']:.1f} %" in _visible(page)
    assert page.read_text().count("data:image/jpeg") == 1  # the sheet


def test_two_runs(runs: Runs, tmp_path: Path) -> None:
    first, second = read_run(runs.gps), read_run(runs.bias)
    a, b = first.scores(), second.scores()
    expected = paired_bootstrap(np.array(list(a.values())), np.array([b[name] for name in a]))
    assert difference(first, second) == expected
    words = _visible(write_report([runs.gps, runs.bias], tmp_path / "report.html"))
    assert f"bias minus gps: {100 * expected.value:+.1f} points" in words
    settings = words[words.index("Settings that differ") :]
    assert "method" in settings
    assert "epochs" not in settings[: settings.index("To do it again")]


def test_a_comparison_says_what_to_take(runs: Runs) -> None:
    both = read_run(runs.gps), read_run(runs.bias)
    same, better = Interval(0.01, -0.1, 0.12), Interval(0.2, 0.1, 0.3)
    cheapest, seeds = advice(both, {"bias minus gps": same})
    assert cheapest.startswith("Take the cheapest: bias trains the fewest parameters")
    assert seeds.startswith("All runs have the same seed")
    assert list(advice(both, {"bias minus gps": better})) == [seeds]
    assert list(advice(both, {})) == []


def test_other_images_are_not_compared(runs: Runs, tmp_path: Path) -> None:
    words = _visible(write_report([runs.gps, runs.masks], tmp_path / "report.html"))
    assert "masks and gps were not tested on the same images" in words
    assert result(read_run(runs.gps)) in words


def test_names_are_escaped(runs: Runs, tmp_path: Path) -> None:
    moved = shutil.copytree(runs.gps, tmp_path / "run")
    for name in ("metrics.json", "test_predictions.csv"):
        (moved / name).write_text((moved / name).read_text().replace("class0", "<script>alert(1)</script>"))
    assert "<script>" not in write_report([moved], tmp_path / "report.html").read_text()


def test_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ConfigError, match=r"holds no run of fewtune: there is no config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    begun = shutil.copytree(runs.gps, tmp_path / "begun")
    (begun / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="is not finished; go on with it"):
        write_report([begun], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="given twice"):
        write_report([runs.gps, runs.gps], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_fit_ends_with_a_report(tmp_path: Path) -> None:
    data = coloured_folder(tmp_path / "data")
    done = fewtune("fit", *arguments(data, epochs=1), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "test images are right" in _visible(tmp_path / "run" / "report.html")
    assert "report.html" in done.stdout
    done = fewtune("fit", *arguments(data, epochs=1, report="false"), "--out", tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "bare" / "report.html").exists()


def test_command_line(runs: Runs, tmp_path: Path) -> None:
    done = fewtune("report", runs.gps, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert fewtune("report", tmp_path / "nowhere").returncode == 2


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(runs: Runs, tmp_path: Path, width: int, scheme: str) -> None:
    """No error in the console, no request to anywhere, all pictures shown, no serious fault of accessibility."""
    for chosen in ([runs.gps], [runs.gps, runs.bias], [runs.masks]):
        with opened(write_report(chosen, tmp_path / "report.html"), width, scheme) as seen:
            assert seen.complaints == []
            assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []
            assert seen.broken_pictures() == 0
            assert not seen.overflows()
            assert seen.faults() == []


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("runs/grid/gps/seed-3", "runs/grid/full/seed-3"), ["gps", "full"]),
        (("grid/gps/seed-0", "grid/gps/seed-1", "grid/full/seed-0"), ["gps/seed-0", "gps/seed-1", "full/seed-0"]),
        (("a/run", "a/b/run"), ["run", "b/run"]),
    ],
)
def test_runs_are_called_by_what_tells_their_paths_apart(folders: tuple[str, ...], names: list[str]) -> None:
    assert told_apart([Path("/all", folder) for folder in folders]) == names
