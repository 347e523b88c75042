"""Progress bars on stderr, and none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Iterable[Item], text: str, total: int | None = None) -> Iterator[Item]:
    """Go through `items` with a bar that says how many are done and how long the rest will take."""
    from rich.console import Console
    from rich.progress import track

    quiet = not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(items, text, total=total, console=console, transient=True, disable=quiet)
