"""From training to a file and back: what the delta writes is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewtune
from delta_cases import same_bits, state

timm = pytest.importorskip("timm")


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2, img_size=32)


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5)


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["frozen", "update"])
def test_apply_is_what_was_trained(make: object, dtype: torch.dtype, statistics: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)  # type: ignore[operator]
    backbone = state(model)
    selection = fewtune.select(fewtune.random_importance(model, seed=0), k=2)
    tuner = fewtune.attach(model, selection, running_statistics=statistics)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    model.train()
    for _ in range(2):
        images, labels = torch.randn(4, 3, 32, 32, dtype=dtype), torch.randint(5, (4,))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    delta = tuner.delta({"task": "birds"})
    tuned = {name: tensor.clone() for name, tensor in tuner.plain_state_dict().items()}
    delta.save(tmp_path / "birds.safetensors")
    tuner.detach(keep=False)
    assert same_bits(state(model), backbone)
    loaded = fewtune.load_delta(tmp_path / "birds.safetensors")
    assert loaded == delta
    assert bool(loaded.buffers) is (make is resnet and statistics == "update")
    for verify in ("fast", "full"):
        with loaded.applied_to(model, verify=verify):  # type: ignore[arg-type]
            assert same_bits(model.state_dict(), tuned)
        assert same_bits(state(model), backbone)


def test_a_second_task_after_the_first() -> None:
    """Two tasks trained one after the other on one model object swap on it."""
    model = vit()
    backbone = state(model)
    deltas, tuned = [], []
    for seed in (0, 1):
        tuner = fewtune.attach(model, fewtune.select(fewtune.random_importance(model, seed=seed), k=1 + seed))
        F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(5, (4,))).backward()
        torch.optim.SGD(tuner.parameters(), lr=1.0).step()
        deltas.append(tuner.delta())
        tuned.append({name: t.clone() for name, t in tuner.plain_state_dict().items()})
        tuner.detach(keep=False)
    deltas[0].apply(model)
    deltas[0].swap(model, deltas[1])
    assert same_bits(model.state_dict(), tuned[1])
    deltas[1].swap(model, deltas[0])
    assert same_bits(model.state_dict(), tuned[0])
    deltas[0].revert(model)
    assert same_bits(state(model), backbone)
