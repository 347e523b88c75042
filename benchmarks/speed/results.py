"""Where the benchmarks put their figures: docs/benchmarks/NAME.json, a list of runs, each with what it ran on."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewtune.bench.record import processor

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"


def machine(device: str, threads: int) -> dict[str, Any]:
    """What a run ran on."""
    about: dict[str, Any] = {"torch": torch.__version__, "peft": version("peft"), "timm": version("timm")}
    if device == "cuda":
        tf32 = torch.backends.cuda.matmul.fp32_precision
        return {"device": torch.cuda.get_device_name(), "float32 products": tf32, **about}
    return {"device": f"CPU {processor()}, {threads} threads", **about}


def load(name: str) -> list[dict[str, Any]]:
    """The runs recorded under a name."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def add_result(name: str, device: str, threads: int, settings: dict[str, Any], figures: dict[str, Any]) -> None:
    """Records a run, in place of an earlier one with the same settings on the same device."""
    run = {"machine": machine(device, threads), "settings": settings, "figures": _rounded(figures)}
    kept = [
        other
        for other in load(name)
        if (other["settings"], other["machine"]["device"]) != (settings, run["machine"]["device"])
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps([*kept, run], indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
