"""Selections are saved and loaded; a damaged file is one clear error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewtune.errors import SelectionError
from fewtune.selection import Selection, select
from selected import scores_of


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_save_and_load(tmp_path: Path, granularity: Any) -> None:
    selection = select(scores_of(), k=1.5, granularity=granularity, norm="all")
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert loaded == selection
    assert loaded.anatomy == selection.anatomy
    assert loaded.summary() == selection.summary()
    assert [path.name for path in tmp_path.iterdir()] == ["selection.safetensors"]


def altered(source: Path, target: Path, change: Any) -> Path:
    """A copy of a selection file with another header."""
    with safe_open(source, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["fewtune"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, target, {"fewtune": json.dumps(header)})
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    select(scores_of(), k=1).save(path)
    return path


def test_files_that_are_no_selection(saved: Path, tmp_path: Path) -> None:
    def refused(change: Any, message: str) -> None:
        with pytest.raises(SelectionError, match=message):
            Selection.load(altered(saved, tmp_path / "bad.safetensors", change))

    refused(lambda h, t: h.update(version=99), "has version 99; this fewtune reads up to 1: update fewtune")
    refused(lambda h, t: h.update(format="fewtune-delta"), "is a fewtune-delta file; expected a fewtune-selection")
    refused(lambda h, t: h.pop("anatomy"), "not a selection file, or it is damaged")
    refused(lambda h, t: h["dense"].update(gain=["first.bias"]), "damaged")
    refused(lambda h, t: h["dense"].update(bias=["nothing"]), "unknown parameter nothing")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"].flip(0).clone()}), "out of order")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"] + 500}), "out of order or range")
    refused(lambda h, t: t.update({"conv.weight": t["conv.weight"].view(1, -1)}), "out of order or range")
    refused(lambda h, t: t.update({"nothing": t["conv.weight"].clone()}), "damaged")
    with pytest.raises(SelectionError, match="does not exist"):
        Selection.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SelectionError, match="not a selection file"):
        Selection.load(tmp_path / "other.safetensors")


def loads_or_is_refused(path: Path) -> bool:
    """Whether a file loads; anything but a selection or a SelectionError is a fault."""
    try:
        selection = Selection.load(path)
    except SelectionError:
        return False
    assert selection.trained > 0
    assert selection.summary()
    return True


def test_damaged_bytes(saved: Path, tmp_path: Path) -> None:
    good, dice = saved.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        match dice.randrange(3):
            case 0:
                bad = bad[: dice.randrange(len(bad))]
            case 1:
                bad[dice.randrange(len(bad))] = dice.randrange(256)
            case _:
                start = dice.randrange(len(bad))
                bad[start : start + dice.randrange(1, 40)] = dice.randbytes(dice.randrange(40))
        path = tmp_path / "bad.safetensors"
        path.write_bytes(bad)
        refused += not loads_or_is_refused(path)
    assert refused > 200


NONSENSE: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "weight", [], [[]], {}, {"a": 1}, [0, 0], [10**20, 10**20]]


def test_damaged_headers(saved: Path, tmp_path: Path) -> None:
    """Any value of the header replaced by any nonsense."""
    dice = random.Random(0)

    def change(header: Any, tensors: dict[str, Tensor]) -> None:
        node, key = header, dice.choice(list(header))
        while isinstance(node[key], (dict, list)) and node[key] and dice.random() < 0.8:
            node = node[key]
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if dice.random() < 0.2 and isinstance(node, dict):
            node[str(dice.choice(NONSENSE))] = node.pop(key)
        else:
            node[key] = dice.choice(NONSENSE)

    refused = sum(not loads_or_is_refused(altered(saved, tmp_path / "bad.safetensors", change)) for _ in range(400))
    assert refused > 200
