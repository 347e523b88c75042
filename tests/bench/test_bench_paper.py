"""The paper's tables as data: against the paper's text where it is at hand, and against their own arithmetic."""

from __future__ import annotations

import os
import re
import statistics
from pathlib import Path

import pytest

from fewtune.bench.paper_tables import expanded, numbers, paper_table, plain
from fewtune.bench.report import printed
from fewtune.data.catalog import DECLARATIONS
from fewtune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(os.environ.get("FEWTUNE_TEST_DATA", ROOT / "../shared/data")).parent / "paper" / "gps-paper.txt"
WITH_CELLS = [number for number in numbers() if paper_table(number).cells]
PART = r"\([abc]\)"
SLIPS = {(2, "VPT-Shallow [41]"): 0.04, (2, "VPT-Deep [41]"): 0.01}
"""Rows whose printed mean is not that of their printed cells, and by how much."""


@pytest.mark.data
@pytest.mark.parametrize("number", WITH_CELLS)
def test_every_row_stands_in_the_text(number: int) -> None:
    """All cells of a row in one line of the text, in order, and nothing else of figures between them."""
    if not TEXT.exists():
        pytest.skip(f"the paper's text is not at {TEXT}")
    lines = [[cell.strip() for cell in line.split("|")] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    for row in paper_table(number).cells:
        cells = [cell for name, cell in row.items() if cell and name not in ("Part", "Group")]
        if cells == ["GPS"]:  # Tab. 6: its cells are missing from the text
            continue
        assert any(_contains(line, cells) for line in lines), cells


def _contains(line: list[str], cells: list[str]) -> bool:
    filled = [cell for cell in line if cell]
    return any(filled[i : i + len(cells)] == cells for i in range(len(filled) - len(cells) + 1))


@pytest.mark.data
def test_no_row_of_the_text_is_left_out() -> None:
    """Every line of the text that begins with a method or a part and holds figures is a row of some table."""
    if not TEXT.exists():
        pytest.skip(f"the paper's text is not at {TEXT}")
    rows = [[cell for cell in row.values() if cell] for n in WITH_CELLS for row in paper_table(n).cells]
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|") if cell.strip()]
        if len(re.findall(r"\| \d+\.\d+", line)) >= 2 and line.endswith("|"):
            own = [cell for cell in cells if not re.fullmatch(PART, cell)]
            assert any(_contains(own, [cell for cell in row if not re.fullmatch(PART, cell)]) for row in rows), line


def test_sizes() -> None:
    sizes = {number: (len(paper_table(number).cells), len(paper_table(number).header)) for number in numbers()}
    assert sizes == {
        1: (8, 7), 2: (11, 8), 3: (11, 22), 4: (4, 5), 5: (0, 0), 6: (7, 7), 7: (27, 3), 8: (8, 5), 9: (12, 9),
        10: (8, 7), 11: (8, 7), 12: (7, 7), 13: (30, 7),
    }  # fmt: skip


@pytest.mark.parametrize(("number", "count", "mean"), [(2, 5, "Mean Acc."), (3, 19, "Mean Acc."), (9, 5, "Mean Acc.")])
def test_printed_means_are_those_of_the_printed_cells(number: int, count: int, mean: str) -> None:
    table = paper_table(number)
    single = [name for name, column in table.columns.items() if len(column.of) == 1]
    assert len(single) == count
    assert {table.columns[name].of[0] for name in single} == set(table.columns[mean].of)
    for row in table.cells:
        got = statistics.fmean(table.value(row, name) for name in single)  # type: ignore[misc]
        told = table.value(row, mean)
        assert abs(got - told) == pytest.approx(SLIPS.get((number, row[table.label]), 0), abs=0.0051), row


def test_the_mean_of_24_tasks() -> None:
    """Tab. 1 from Tab. 2 and 3: (5 * FGVC + 19 * VTAB) / 24."""
    fgvc = {plain(row["Method"]): float(row["Mean Acc."]) for row in paper_table(2).cells}
    vtab = {plain(row["Method"]): float(row["Mean Acc."]) for row in paper_table(3).cells}
    table = paper_table(1)
    assert len(table.columns["Mean Acc."].of) == 24
    for row in table.cells:
        name = table.rows.get(row["Method"], plain(row["Method"]))
        slip = 2.0 if name == "adapter" else 0.0  # printed 60.04, and its FGVC and VTAB give 62.04
        assert float(row["Mean Acc."]) + slip == pytest.approx((5 * fgvc[name] + 19 * vtab[name]) / 24, abs=0.011), row


def test_means_of_swin_and_convnext_agree_between_tables() -> None:
    means = {row["Method"]: row["Mean Acc."] for row in paper_table(9).cells}
    for row in paper_table(4).cells:
        for backbone in ("Swin-B", "ConvNeXt-B"):
            label = next(name for name in means if plain(name) == f"{backbone} + {plain(row['Method'])}".lower())
            assert means[label] == row[f"{backbone} Ave. Acc."]


def test_both_means_of_vtab_and_the_shifted_row() -> None:
    table = printed(3)
    column = table.columns.index("Mean of the 3 group means")
    got = {row[0]: row[column] for row in table.rows}
    assert got["GPS (Ours)"] == "77.47"
    assert got["Full [41]"] == "68.97"
    assert got["SPT-ADAPTER [28]"] == ""  # its cells stand in wrong columns
    assert {row[0]: row[table.columns.index("Mean Acc.")] for row in table.rows}["GPS (Ours)"] == "75.18"


def test_what_our_copy_lacks_stays_empty() -> None:
    assert paper_table(5).cells == ()
    (gps,) = [row for row in paper_table(6).cells if row["Selection"] == "GPS"]
    assert set(gps.values()) == {"(c)", "GPS", ""}
    assert paper_table(10).cells[4]["ConvNeXt-B Acc."] == "-"
    assert paper_table(10).value(paper_table(10).cells[4], "ConvNeXt-B Acc.") is None


def test_columns_name_declared_data_sets() -> None:
    assert len(expanded(["vtab"])) == 19
    assert len(expanded(["fgvc"])) == 5
    for number in numbers():
        for column in paper_table(number).columns.values():
            assert set(column.of) <= set(DECLARATIONS)
    with pytest.raises(ConfigError, match=r"no Tab\. 14"):
        paper_table(14)
