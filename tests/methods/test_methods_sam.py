"""The methods in Segment Anything's image encoder, whose mask decoder is trained whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewtune.config import recipe_from
from fewtune.errors import ModelError
from fewtune.methods import SSF, VPT, Adapter, Inserted, LoRA, MethodFile, Modules, load_method_file
from fewtune.methods.spt_plan import plan, sensitivity
from fewtune.neurons import describe
from fewtune.segmentation.evaluate import evaluate
from fewtune.segmentation.loaded import load_tuned_segmenter
from fewtune.segmentation.models import Segmenter
from fewtune.tasks import fit
from masks import mask_folder
from segmenters import SIZE, saved_sam, small_sam

METHODS: dict[str, Modules] = {
    "adapter": Adapter(4),
    "adapter-both": Adapter(4, "both"),
    "lora": LoRA(2),
    "ssf": SSF(),
}


def images() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def segmenter(tmp_path: Path) -> Segmenter:
    return small_sam(tmp_path / "sam")


def trained_step(tuner: Inserted, segmenter: Segmenter) -> None:
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, weight_decay=0.1)
    segmenter.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        segmenter.model(images()).square().mean().backward()
        optimizer.step()
    segmenter.model.eval()


@pytest.mark.parametrize("name", [*METHODS, "spt-lora", "spt-adapter"])
def test_a_method_in_the_image_encoder_trains_saves_and_loads(name: str, segmenter: Segmenter, tmp_path: Path) -> None:
    model = segmenter.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if name.startswith("spt"):
        anatomy = describe(model, segmenter.head)
        batch = (images(), torch.zeros(1))
        got = sensitivity(model, [batch], anatomy, lambda model, x, _: model(x).square().mean())
        method: Modules = plan(got, model, anatomy, structure=name[4:], budget=3_000, rank=2)  # type: ignore[arg-type]
    else:
        method = METHODS[name]
    tuner = Inserted(model, segmenter.head, method)
    trained_step(tuner, segmenter)
    assert all(p.grad is not None for p in tuner.added.parameters().values())
    tuner.delta().save(tmp_path / "task.safetensors")
    with torch.no_grad():
        expected = model(images())
    fresh = small_sam(tmp_path / "again")
    load_method_file(tmp_path / "task.safetensors").apply(fresh.model)
    with torch.no_grad():
        assert torch.equal(fresh.model.eval()(images()), expected)
    plain = tuner.plain_state_dict()
    changed = {key for key in before if not torch.equal(before[key], plain[key])}
    assert all(
        key.startswith(segmenter.head) or key in (*method.arrays(), *getattr(method, "whole", ())) for key in changed
    )
    if name in ("lora", "ssf", "spt-lora"):
        merged = small_sam(tmp_path / "merged")
        merged.model.load_state_dict(tuner.merged_state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(merged.model(images()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_do_not_go_into_its_grid(deep: bool, segmenter: Segmenter) -> None:
    with pytest.raises(ModelError, match="take another method"):
        Inserted(segmenter.model, segmenter.head, VPT(deep))


@pytest.mark.parametrize("method", ["adapter", "lora", "ssf", "spt-lora"])
def test_a_segmentation_run_and_its_task_file(method: str, tmp_path: Path) -> None:
    recipe = recipe_from(
        {
            "task": "segmentation", "method": method, "model": saved_sam(tmp_path / "sam"), "image_size": SIZE,
            "data": str(mask_folder(tmp_path / "data", 10)), "test_fraction": 0.3, "augment": "plain", "epochs": 1,
            "batch_size": 2, "accelerator": "cpu", "rank": 2, "bottleneck": 2, "spt_budget": 3_000,
        }
    )  # fmt: skip
    result = fit(recipe, tmp_path / "run")
    task = load_tuned_segmenter(result.folder.delta)
    assert isinstance(task.delta, MethodFile)
    assert task.delta.trained == result.metrics["trained"]
    again = evaluate(recipe.data, delta=result.folder.delta, batch_size=2, test_fraction=0.3, accelerator="cpu")
    assert again.report.to_json() == result.metrics["test"]
