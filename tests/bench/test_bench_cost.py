"""The cost figure on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewtune.bench import cost
from fewtune.bench.cost import PAPER, Contender, Setting, memory, step_times
from fewtune.errors import ConfigError, TuningError
from fewtune.models import logits
from fewtune.tuning import matmul

SETTING = Setting("timm:test_vit", batch=8, image_size=32, classes=4, accelerator="cpu")


def test_times_of_all_methods_side_by_side() -> None:
    got = step_times(SETTING, list(PAPER), rounds=1)
    assert list(got) == list(PAPER)
    for row in got.values():
        assert row["train_ms"] > 0
        assert row["inference_ms"] > 0
    assert got["full"]["percent_of_backbone"] > 100 > got["gps"]["percent_of_backbone"]
    assert got["linear"]["trained"] == 4 * 65
    assert got["gps"]["selection_seconds"] > 0
    assert got["bias"]["selection_seconds"] == 0
    blocks, width = 6, 64  # of test_vit
    assert got["vpt-shallow"]["trained"] - got["linear"]["trained"] == 200 * width
    assert got["vpt-deep"]["trained"] - got["linear"]["trained"] == 50 * blocks * width


def test_a_step_trains_and_what_is_deployed_predicts_the_same() -> None:
    images, labels = SETTING.batch_of_noise(torch.device("cpu"))
    for method in (*PAPER, "spt-lora"):
        candidate = Contender(method, SETTING, images, labels)
        before = [parameter.detach().clone() for parameter in candidate.tuner.parameters()]
        candidate.train_step()
        changed = [not torch.equal(a, b) for a, b in zip(before, candidate.tuner.parameters(), strict=True)]
        assert any(changed), method
        with torch.no_grad():
            wanted = logits(candidate.model.eval()(images))
            got = logits(candidate.deployed()(images))
        assert torch.allclose(got, wanted, atol=1e-5), method


@pytest.mark.slow
def test_memory_is_of_a_process_of_its_own() -> None:
    """Full fine-tuning holds a gradient of every weight, inference holds none."""
    large = Setting("timm:vit_tiny_patch16_224", batch=8, image_size=64, classes=4, accelerator="cpu")
    full, linear = memory(large, "full"), memory(large, "linear")
    assert full["train_peak_bytes"] > linear["train_peak_bytes"]
    assert full["train_peak_bytes"] > full["inference_peak_bytes"]


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="no cost is known of 'gpss'"):
        SETTING.recipe("gpss")


def test_one_matrix_library_for_all_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(setting: Setting, methods: list[str], rounds: int) -> dict[str, dict[str, float]]:
        seen.append("onednn" if matmul._kernels is not None else "torch")
        return {method: {} for method in methods}

    monkeypatch.setattr(cost, "step_times", look)
    monkeypatch.setattr(cost, "memory", lambda setting, method: {})
    libraries = ["torch", *(["onednn"] if matmul.onednn_available() else [])]
    for library in libraries:
        cost.measure(replace(SETTING, library=library), ["bias"], 1)  # type: ignore[arg-type]
    assert seen == libraries
    with pytest.raises(TuningError, match=r"matrix_library\('mkl'\); expected one of torch, onednn"):
        cost.measure(replace(SETTING, library="mkl"), ["bias"], 1)  # type: ignore[arg-type]
