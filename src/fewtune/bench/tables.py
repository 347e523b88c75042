"""Tables of text, and how they are written: Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of text under columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    groups: dict[str, int] = field(default_factory=dict)
    """Headings over the columns and how many each spans, from the column `text_columns` on."""
    text_columns: int = 1
    """The first so many columns are words, the others figures."""
    ours: frozenset[int] = frozenset()
    """Rows that were measured here, among others that were printed elsewhere."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


def markdown(tables: Sequence[Table]) -> str:
    """Headings, tables and notes; groups of columns stand before a column's name."""
    return "\n".join(line for table in tables for line in _markdown(table))


def _markdown(table: Table) -> list[str]:
    over = _spread(table)
    names = [f"{group}: {name}" if group else name for group, name in zip(over, table.columns, strict=True)]
    rule = ["---"] * table.text_columns + ["---:"] * (len(names) - table.text_columns)
    lines = [f"## {table.title}", "", _row(names), f"|{'|'.join(rule)}|"]
    for number, row in enumerate(table.rows):
        lines.append(_row([f"**{cell}**" if number in table.ours and cell else cell for cell in row]))
    return [*lines, "", *(f"- {note}" for note in table.notes), *([""] if table.notes else [])]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(table: Table) -> list[str]:
    """The group of every column; "" where there is none."""
    names = [""] * table.text_columns + [name for name, span in table.groups.items() for _ in range(span)]
    return (names + [""] * len(table.columns))[: len(table.columns)]


def csv_text(tables: Sequence[Table]) -> str:
    """One block a table: its title alone in a row, the columns, the rows; an empty row between blocks."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for number, table in enumerate(tables):
        if number:
            writer.writerow([])
        if len(tables) > 1:
            writer.writerow([table.title])
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    return buffer.getvalue()


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th.text, td.text { text-align: left; }
thead th { border-bottom: 2px solid #666; }
thead tr.groups th { border-bottom: 1px solid #666; text-align: center; }
tr.ours td { font-weight: 600; background: #f2f7f2; }
.wide { overflow-x: auto; }"""


def html_page(tables: Sequence[Table]) -> str:
    """A whole page without scripts or anything from elsewhere."""
    body = "\n".join(_html(table) for table in tables)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(tables[0].title if tables else 'results')}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _html(table: Table) -> str:
    kind = [' class="text"' if i < table.text_columns else "" for i in range(len(table.columns))]
    lines = [f"<h2>{html.escape(table.title)}</h2>", '<div class="wide"><table><thead>']
    if table.groups:
        rest = len(table.columns) - table.text_columns - sum(table.groups.values())
        spans = "".join(f'<th colspan="{span}">{html.escape(name)}</th>' for name, span in table.groups.items())
        after = f'<th colspan="{rest}"></th>' if rest else ""
        lines.append(f'<tr class="groups"><th colspan="{table.text_columns}"></th>{spans}{after}</tr>')
    lines.append("<tr>" + _cells("th", table.columns, kind) + "</tr></thead><tbody>")
    for number, row in enumerate(table.rows):
        ours = ' class="ours"' if number in table.ours else ""
        lines.append(f"<tr{ours}>{_cells('td', row, kind)}</tr>")
    lines.append("</tbody></table></div>")
    if table.notes:
        lines.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in table.notes) + "</ul>")
    return "\n".join(lines)


def _cells(tag: str, cells: Sequence[str], kind: Sequence[str]) -> str:
    return "".join(f"<{tag}{k}>{html.escape(cell)}</{tag}>" for cell, k in zip(cells, kind, strict=True))
