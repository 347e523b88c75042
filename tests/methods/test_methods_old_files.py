"""Task files that fewtune 0.1.0 wrote, of every method that adds modules (tests/data_files/methods), are read today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewtune.methods import load_task_file
from methods_cases import METHODS, pictures
from old_files import steady_model

FILES = Path(__file__).parents[1] / "data_files/methods"
EXPECTED = json.loads((FILES / "expected.json").read_text())
"""By method: what was trained, and the logits of the tuned model on `pictures`, as they were written."""


@pytest.mark.parametrize("method", METHODS)
def test_an_old_task_file_gives_the_outputs_that_it_gave(method: str, tmp_path: Path) -> None:
    task, model = load_task_file(FILES / f"{method}.safetensors"), steady_model()
    assert (task.trained, task.metadata) == (EXPECTED[method]["trained"], {"method": method})
    task.apply(model)
    with torch.no_grad():
        logits = model.eval()(pictures("vit"))
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[method]["logits"], dtype=torch.double), rtol=0, atol=1e-9)
    task.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (FILES / f"{method}.safetensors").read_bytes()
