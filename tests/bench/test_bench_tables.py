"""Ours beside the paper's printed values, and the three ways to write a table; cells are made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewtune.bench.grid import Grid, grid_from
from fewtune.bench.paper_tables import expanded, paper_table
from fewtune.bench.plan import Run
from fewtune.bench.record import Record, record_of
from fewtune.bench.report import backbone_name, beside, namesake, printed
from fewtune.bench.results import Cell, difference
from fewtune.bench.tables import Table, csv_text, html_page, markdown
from fewtune.config import recipe_from
from fewtune.errors import DataError
from fewtune.training.run_folder import RunFolder
from runs import fewtune

VIT = "timm:vit_base_patch16_224.augreg_in21k"


def grid_over(keys: tuple[str, ...], **methods: dict[str, Any]) -> Grid:
    tasks = {key: {"data": f"task:{key}?root=data"} for key in keys}
    return grid_from({"settings": {"model": VIT}, "tasks": tasks, "methods": methods})


def cell(grid: Grid, task: str, method: str, *accuracies: float, **more: Any) -> Cell:
    about = {"percent_of_backbone": 0.25, "trained": 214_500, **more}
    runs = {
        seed: Record(f"{task}/{method}/seed-{seed}", "train", "", 1.0, {}, "",
                     metrics={"test": {"accuracy": {"value": value}}, **about})
        for seed, value in enumerate(accuracies)
    }  # fmt: skip
    return Cell(task, method, grid.recipe(task, method, {}, 0), runs, {})


def row_of(table: Table, start: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0].startswith(start)]
    return dict(zip(table.columns, row, strict=True))


def test_both_means_of_vtab() -> None:
    grid = grid_over(expanded(["vtab"]), gps={"method": "gps"})
    given = {key: 0.5 + 0.02 * number for number, key in enumerate(grid.tasks)}
    cells = {(key, "gps"): cell(grid, key, "gps", value, value) for key, value in given.items()}
    table = beside(paper_table(3), grid, cells)
    ours = row_of(table, "gps")
    assert ours["CIFAR-100"] == f"{100 * given['vtab-cifar']:.1f} ± 0.00"
    values = list(given.values())
    assert ours["Mean Acc."] == f"{100 * statistics.fmean(values):.2f}"
    groups = [values[:7], values[7:11], values[11:]]
    assert ours["Mean of the 3 group means"] == f"{100 * statistics.fmean(map(statistics.fmean, groups)):.2f}"
    assert ours["Mean Params. (%)"] == "0.25"
    names = [row[0] for row in table.rows]
    assert names.index("gps (fewtune)") == names.index("GPS (Ours)") + 1
    assert table.ours == {names.index("gps (fewtune)")}
    assert table.groups == {"Natural": 7, "Specialized": 4, "Structured": 8, "VTAB": 2}


def test_a_mean_needs_all_of_its_data_sets_and_a_cell_its_own_backbone() -> None:
    keys = expanded(["fgvc"])
    grid = grid_over(keys, gps={"method": "gps"}, swin={"method": "gps", "model": "timm:swin_base_patch4_window7_224"})
    cells = {(key, "gps"): cell(grid, key, "gps", 0.9) for key in keys[:-1]}
    cells |= {(key, "swin"): cell(grid, key, "swin", 0.8) for key in keys}
    table = beside(paper_table(2), grid, cells)
    ours = row_of(table, "gps (fewtune)")
    assert ours["CUB-200-2011"] == "90.0"
    assert ours["Mean Acc."] == ""
    assert not [row for row in table.rows if row[0].startswith("swin")]  # Tab. 2 is of ViT-B/16
    nine = beside(paper_table(9), grid, cells)
    assert row_of(nine, "swin")["Mean Acc."] == "80.00"
    assert row_of(nine, "swin")["Mean Params. (M)"] == f"{0.2145:.2f}"
    names = [row[0] for row in nine.rows]
    assert names.index("swin (fewtune)") == names.index("Swin-B + GPS (Ours)") + 1
    assert row_of(beside(paper_table(4), grid, cells), "swin")["Swin-B Ave. Acc."] == "80.00"


def test_the_mean_of_24_tasks_and_methods_the_paper_lacks() -> None:
    keys = (*expanded(["fgvc"]), *expanded(["vtab"]))
    grid = grid_over(keys, vpt={"method": "vpt-deep"}, mine={"method": "gps", "importance": "random"})
    cells = {(key, method): cell(grid, key, method, 0.5) for key in keys for method in ("vpt", "mine")}
    cells["nabirds", "vpt"] = cell(grid, "nabirds", "vpt", 0.74)
    table = beside(paper_table(1), grid, cells)
    assert row_of(table, "vpt (fewtune)")["Mean Acc."] == "51.00"
    names = [row[0] for row in table.rows]
    assert names.index("vpt (fewtune)") == names.index("VPT [41]") + 1
    assert names[-1] == "mine (fewtune)"


def test_imagenet_and_its_kin() -> None:
    grid = grid_over(("imagenet-1k",), gps={"method": "gps"})
    ood = {"imagenet-a": {"accuracy": {"value": 0.25}}, "imagenet-c": {"mce": 0.5}}
    table = beside(paper_table(8), grid, {("imagenet-1k", "gps"): cell(grid, "imagenet-1k", "gps", 0.5, ood=ood)})
    ours = row_of(table, "gps (fewtune)")
    assert (ours["ImageNet-A"], ours["ImageNet-R"], ours["ImageNet-C"]) == ("25.00", "", "50.00")


def test_differences_are_paired_by_image_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    """Hits of labelled images, Dice of masks; the rows of two runs need not be in one order."""
    hits = {"gps": {"a": "xx", "b": "xy", "c": "yy"}, "full": {"c": "yx", "a": "xx", "b": "xx"}}

    def finished(method: str, seeds: tuple[int, ...], task: str, test: dict[str, Any]) -> Cell:
        settings = {"classification": {}, "segmentation": {"task": "segmentation"}}[task]
        grid = grid_from(
            {"settings": {"model": VIT, "data": "d", **settings}, "tasks": {"t": {}}, "methods": {method: {}}}
        )
        runs = {}
        for seed in seeds:
            run = Run("train", "t", method, seed)
            recipe = run.recipe(grid, {})
            folder = RunFolder(tmp_path / task / run.name)
            folder.begin(recipe)
            if task == "classification":
                lines = [f"{name},{p[0]},{p[1]},0.4,0.6" for name, p in hits[method].items()]
                lines.insert(0, "file,label,prediction,p(x),p(y)")
            else:
                lines = ["file,dice", *(f"{name},{0.1 * i}" for i, name in enumerate(hits[method]))]
            folder.predictions.write_text("\n".join(lines) + "\n")
            folder.metrics.write_text(json.dumps({"seconds": 1.0, "test": {"images": 3, **test}}))
            runs[seed] = record_of(run, recipe, tmp_path / task)
        return Cell("t", method, recipe, runs, {})

    gps, full = (
        finished(method, seeds, "classification", {"accuracy": {"value": 0.5}})
        for method, seeds in (("gps", (0, 1)), ("full", (0,)))
    )
    between = difference(gps, full)
    assert between is not None
    assert between.value == pytest.approx((0 + 1 - 1) / 3)
    assert between.seeds == 1
    assert gps.loss == pytest.approx(-(2 * math.log(0.4) + math.log(0.6)) / 3)
    masks = [finished(method, (0,), "segmentation", {"dice": {"value": 0.5}}) for method in ("gps", "full")]
    dice = difference(*masks)
    assert dice is not None
    assert dice.value == pytest.approx(0.0)  # a: 0.1 - 0, b: 0.2 - 0.1, c: 0 - 0.2
    assert dice.low < 0 < dice.high
    hits["full"]["z"] = hits["full"].pop("a")
    with pytest.raises(DataError, match="different images"):
        difference(gps, finished("full", (0,), "classification", {"accuracy": {"value": 0.5}}))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "gps"),
        ({"granularity": "network"}, "net"),
        ({"granularity": "layer"}, "layer"),
        ({"importance": "random"}, "neuron random"),
        ({"importance": "random", "granularity": "network"}, "net random"),
        ({"importance": "magnitude"}, "magnitude"),
        ({"objective": "cross_entropy"}, "head+ce"),
        ({"method": "spt-lora"}, "spt-lora"),
    ],
)
def test_names_of_the_papers_rows(settings: dict[str, Any], name: str) -> None:
    assert namesake(recipe_from({"model": VIT, "data": "x", **settings})) == name


def test_backbones() -> None:
    assert backbone_name("timm:vit_base_patch16_224.orig_in21k") == "ViT-B/16"
    assert backbone_name("demo:vit-small") is None


TABLE = Table("a < b", ("method", "one|two", "three"), (("x", "1", ""), ("y & z", "3", "4")), ("a note",),
              {"both": 2}, 1, frozenset({1}))  # fmt: skip


def test_markdown() -> None:
    assert markdown([TABLE]).splitlines() == [
        "## a < b", "", "| method | both: one\\|two | both: three |", "|---|---:|---:|", "| x | 1 |  |",
        "| **y & z** | **3** | **4** |", "", "- a note",
    ]  # fmt: skip


def test_csv() -> None:
    rows = list(csv.reader(io.StringIO(csv_text([TABLE]))))
    assert rows == [["method", "one|two", "three"], ["x", "1", ""], ["y & z", "3", "4"]]
    two = list(csv.reader(io.StringIO(csv_text([TABLE, TABLE]))))
    assert two[0] == ["a < b"]
    assert two[4:6] == [[], ["a < b"]]


def test_html() -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.text: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_data(self, data: str) -> None:
            self.text.append(data)

    text = html_page([TABLE])
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert {"a < b", "y & z", "a note", "both"} <= set(reader.text)
    assert '<th colspan="2">both</th>' in text
    assert len(re.findall(r'<tr class="ours">', text)) == 1


def test_on_the_command_line(tmp_path: Any) -> None:
    done = fewtune("bench", "table", "--paper", "10", "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert rows[0][2] == "ViT-B/16 Acc."
    assert rows[-1][:3] == ["GPS (Ours)", "paper", "94.02"]
    assert fewtune("bench", "table", "--to", tmp_path / "all.html").returncode == 0
    assert "Tab. 3" in (tmp_path / "all.html").read_text()
    wrong = fewtune("bench", "table", "--to", tmp_path / "all.pdf")
    assert wrong.returncode == 2
    assert "md, csv or html, got 'pdf'" in wrong.stderr
    assert fewtune("bench", "run", tmp_path / "none.yaml").returncode == 2


def test_every_table_of_the_paper_can_be_written() -> None:
    for number in range(1, 14):
        table = printed(number)
        assert not table.ours
        assert markdown([table]).startswith(f"## Tab. {number}: ")
