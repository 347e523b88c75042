"""Shortening local paths in the records of a run: the last part is kept, the folders above it are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_ABSOLUTE = re.compile(r"(?:^|(?<=[:=,]))(?:~|\.\.?(?=[\\/])|[A-Za-z]:(?=[\\/]))?[\\/][^&,]*")
"""A path from a root, a home, a drive or the current folder: alone, after `file:` or `root=`, or in a list."""
KEPT_AS_IT_IS = ("class_names", "seen")
"""Parts of the metadata that hold names of classes and digests of images, but no paths."""


def without_folders(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a task file without local folders, and the dotted names of the entries that were changed."""
    cleaned = {key: value if key in KEPT_AS_IT_IS else _cleaned(value) for key, value in metadata.items()}
    before = dict(_entries(metadata))
    return cleaned, [name for name, value in _entries(cleaned) if before[name] != value]


def short(text: str) -> str:
    """A text in which every local path is its last part: "file:/data/a/b.pth" -> "file:b.pth"."""
    if "://" in text:
        return text
    if "/" in text and Path(text).exists():  # a path below the current folder
        return Path(text).name
    return _ABSOLUTE.sub(lambda match: PureWindowsPath(match[0]).name or "data", text)


def _cleaned(value: Any) -> Any:
    match value:
        case str():
            return short(value)
        case dict():
            return {key: _cleaned(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_cleaned(inner) for inner in value]
        case _:
            return value


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All plain values within dicts and lists, by their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _entries(inner, f"{name}.{index}")
    else:
        yield name, value
