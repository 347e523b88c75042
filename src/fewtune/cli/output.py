"""How results are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """Indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Mapping[str, str]], caption: str = "") -> None:
    """Rows of the same columns on stdout, aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, caption=caption or None, caption_justify="left")
    for number, column in enumerate(rows[0] if rows else []):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console(160).print(table)


def console(least: int) -> Console:
    """Prints on stdout; where that is no terminal, lines are at least so wide that tables keep their rows."""
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, least))
