"""Presets: settings that go together, by name. What each sets stands in presets.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Preset = Literal["paper", "fast", "best"]
FILE = Path(__file__).with_name("presets.yaml")


@cache
def presets() -> dict[str, dict[str, Any]]:
    """The settings of every preset, by its name."""
    settings: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return settings


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe with those of the preset that it names, where it does not say them itself."""
    return {**presets().get(str(values.get("preset")), {}), **values}


def shown(name: str) -> str:
    """A preset as it stands in the file, with the remarks above it."""
    blocks = FILE.read_text(encoding="utf-8").split("\n\n")
    return next(block for block in blocks if f"\n{name}:\n" in block).strip() + "\n"
