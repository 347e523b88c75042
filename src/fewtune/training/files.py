"""Text files of a run folder: whole or absent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewtune.files import write_bytes


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all. OSError where the disk is full or the folder may not be written."""
    write_bytes(Path(path), text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write plain dicts, lists and numbers as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV; the first row's keys are the header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
