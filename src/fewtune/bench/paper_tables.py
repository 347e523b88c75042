"""The paper's tables, as they are printed, and what their columns mean (`paper/*.csv`, `paper/tables.yaml`)."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fewtune.data.catalog import DECLARATIONS
from fewtune.errors import ConfigError

FOLDER = Path(__file__).parent / "paper"


@dataclass(frozen=True)
class Column:
    """What a column is the mean of: over data sets `of`, of `what`, with the backbone `on` (None: the row says)."""

    of: tuple[str, ...]
    what: str
    on: str | None


@dataclass(frozen=True)
class PaperTable:
    """One table. Cells are text as printed, "-" where the paper prints a dash, "" where our copy lacks the cell."""

    number: int
    title: str
    header: tuple[str, ...]
    cells: tuple[dict[str, str], ...]
    label: str
    """The column that says what a row is about."""
    columns: dict[str, Column]
    computed: dict[str, tuple[tuple[str, ...], ...]]
    """Mean of group means that the paper does not print: name -> the data sets of each group."""
    doubtful: frozenset[str]
    """Rows whose cells stand in wrong columns; nothing is computed from them."""
    rows: dict[str, str]
    """Rows whose method their text does not tell."""
    groups: dict[str, int]
    notes: tuple[str, ...]

    def value(self, row: dict[str, str], column: str) -> float | None:
        """A printed cell as a number; the part before ± where there is one. None where there is none."""
        number = re.match(r"-?[\d,]*\.?\d+", row[column])
        return float(number[0].replace(",", "")) if number else None

    def group_mean(self, row: dict[str, str], name: str) -> float | None:
        """A computed column of a printed row: the mean of the means of its groups of data sets."""
        if row[self.label] in self.doubtful:
            return None
        by_key = {column.of[0]: self.value(row, title) for title, column in self.columns.items() if len(column.of) == 1}
        return mean_of([mean_of([by_key.get(key) for key in group]) for group in self.computed[name]])


@cache
def _meanings() -> dict[int, dict[str, Any]]:
    return yaml.safe_load((FOLDER / "tables.yaml").read_text(encoding="utf-8"))


def numbers() -> list[int]:
    """The numbers of all tables, those of which our copy lacks the cells included."""
    return sorted(_meanings())


def paper_table(number: int) -> PaperTable:
    """One table by its number; ConfigError where there is none."""
    if number not in _meanings():
        raise ConfigError(f"the paper has no Tab. {number}; it has {', '.join(map(str, numbers()))}")
    meaning = _meanings()[number]
    file = FOLDER / f"tab{number:02d}.csv"
    rows: list[dict[str, str]] = []
    if file.exists():
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
    return PaperTable(
        number=number,
        title=meaning["title"],
        header=tuple(rows[0]) if rows else (),
        cells=tuple(rows),
        label=meaning.get("label", "Method"),
        columns={name: _column(told, meaning.get("backbone")) for name, told in meaning.get("columns", {}).items()},
        computed={
            name: tuple(expanded(group) for group in groups) for name, groups in meaning.get("computed", {}).items()
        },
        doubtful=frozenset(meaning.get("doubtful", ())),
        rows=meaning.get("rows", {}),
        groups=meaning.get("groups", {}),
        notes=tuple(meaning.get("notes", ())),
    )


def _column(told: dict[str, Any], on: str | None) -> Column:
    return Column(expanded(told["of"]), told.get("what", "accuracy"), told.get("backbone", on))


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Keys of data sets, with groups (fgvc, vtab, vtab-natural, …) replaced by the keys of their members."""
    keys: list[str] = []
    for name in names:
        members = [key for key, one in DECLARATIONS.items() if one.group == name or one.group.startswith(f"{name}-")]
        assert members or name in DECLARATIONS, name
        keys += members or [name]
    return tuple(keys)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or all are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def plain(label: str) -> str:
    """A method's label without citation and case: "GPS (Ours)" -> "gps", "SPT-ADAPTER [28]" -> "spt-adapter"."""
    return re.sub(r"\s*(\[\d+\]|\(ours\))\s*", "", label, flags=re.IGNORECASE).strip().lower()
