"""How many parameters each method trains at its published setting: the figures of docs/methods.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from fewtune.errors import TuningError
from fewtune.methods import METHODS, SSF, VPT, Adapter, LoRA, Modules
from fewtune.methods.bias import bias
from fewtune.methods.spt import SPT
from fewtune.methods.spt_plan import BATCHES, plan, sensitivity
from fewtune.neurons import Places, Role, describe
from fewtune.tasks import prepare
from fewtune.training.tuners import Share
from methods_cases import HEADS, labels, pictures, plain_model
from runs import coloured_folder, tiny_recipe

HEAD = {"vit_base_patch16_224": 76_900, "swin_base_patch4_window7_224": 102_500, "convnext_base": 102_500}
VIT, SWIN, CONVNEXT = HEAD
SHALLOW, DEEP = VPT(deep=False), VPT(deep=True)

COUNTS: dict[tuple[str, Modules], tuple[int, float]] = {
    # trained in the model, head aside; with a head of 100 classes, % of the backbone
    (VIT, Adapter()): (230_544, 0.36),
    (VIT, Adapter(after="both")): (461_088, 0.63),
    (VIT, LoRA()): (589_824, 0.78),
    (VIT, LoRA(rank=8)): (294_912, 0.43),
    (VIT, SHALLOW): (153_600, 0.27),
    (VIT, DEEP): (460_800, 0.63),
    (VIT, SSF()): (205_824, 0.33),
    (SWIN, Adapter()): (230_332, 0.38),
    (SWIN, SHALLOW): (25_600, 0.15),
    (SWIN, DEEP): (601_600, 0.81),
    (SWIN, SSF()): (274_432, 0.43),
    (SWIN, LoRA()): (770_048, 1.01),
    (CONVNEXT, Adapter()): (345_498, 0.51),
    (CONVNEXT, SSF()): (260_608, 0.41),
    (CONVNEXT, LoRA()): (2_887_680, 3.41),
}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "method"), COUNTS, ids=lambda value: getattr(value, "name", value))
def test_trained_parameters_at_the_published_setting(architecture: str, method: Modules) -> None:
    """Without numbers: the models lie on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=100)
        anatomy = describe(model, timm_head(architecture))
        added = method.insert(model, anatomy).parameters()
    count, percent = COUNTS[architecture, method]
    assert sum(parameter.numel() for parameter in added.values()) == count
    assert sum(math.prod(anatomy.shapes[name]) for name in anatomy.named(Role.HEAD)) == HEAD[architecture]
    share = 100 * (count + HEAD[architecture]) / anatomy.backbone_parameters
    assert round(share, 2) == percent


@pytest.mark.parametrize(("architecture", "count", "percent"), [(SWIN, 239_716, 0.28), (CONVNEXT, 232_804, 0.27)])
def test_biases_of_the_other_families(architecture: str, count: int, percent: float) -> None:
    with torch.device("meta"):
        selection = bias(timm.create_model(architecture, num_classes=100), (timm_head(architecture),))
    assert selection.trained == count
    assert round(100 * count / selection.anatomy.backbone_parameters, 2) == percent


def timm_head(architecture: str) -> str:
    return "head" if architecture == VIT else "head.fc"


# -- SPT: where the budget goes


@pytest.mark.parametrize("structure", ["lora", "adapter"])
@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
def test_spt_comes_near_its_budget_and_takes_the_most_sensitive(kind: str, structure: str) -> None:
    model = plain_model(kind)
    anatomy = describe(model, HEADS[kind])
    got = sensitivity(model, [(pictures(kind), labels())], anatomy)
    for budget in (300, anatomy.backbone_parameters // 30):
        method = plan(got, model, anatomy, structure=structure, budget=budget, rank=2)  # type: ignore[arg-type]
        added = method.insert(plain_model(kind), anatomy).parameters()
        trained = sum(p.numel() for p in added.values())
        trained += sum(math.prod(anatomy.shapes[n]) for n in method.whole) + sum(map(len, method.places.values()))
        assert trained == pytest.approx(budget, rel=0.25)
    for name, flat in method.places.items():
        scores = anatomy.views[name].matrix(got[name]).flatten()
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[flat] = True
        assert scores[chosen].min() >= scores[~chosen].max()
        assert f"{method.structured}".count(name.removesuffix(".weight")) == 0


def test_sensitivity_is_the_squared_gradient_summed_over_batches() -> None:
    model = plain_model("vit").train()
    anatomy = describe(model, "head")
    model.requires_grad_(False)
    batches = [(pictures("vit") * scale, labels()) for scale in (1.0, -0.5)]
    got = sensitivity(model, batches, anatomy)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    model.eval().requires_grad_(True)
    expected = 0
    for images, targets in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        expected = expected + model.blocks[0].attn.qkv.weight.grad ** 2
    torch.testing.assert_close(got["blocks.0.attn.qkv.weight"], expected)
    assert "head.weight" not in got
    endless = iter([(pictures("vit"), labels())] * (BATCHES + 3))
    sensitivity(model, endless, anatomy)
    assert len(list(endless)) == 3


def test_spt_refuses_what_it_cannot_work_with() -> None:
    model = plain_model("vit")
    anatomy = describe(model, "head")
    with pytest.raises(TuningError, match="at least one batch"):
        sensitivity(model, [], anatomy)
    with pytest.raises(TuningError, match="not finite"):
        sensitivity(model, [(pictures("vit") * math.nan, labels())], anatomy)
    got = sensitivity(model, [(pictures("vit"), labels())], anatomy)
    with pytest.raises(TuningError, match="less than the class token's 64"):
        plan(got, model, anatomy, structure="lora", budget=64, rank=2)


def test_spt_trains_a_vector_whole_from_a_fifth_and_a_matrix_by_a_branch_from_a_tenth() -> None:
    """Sensitivities made by hand: 7 connections of one matrix, 9 of another, 13 and 12 numbers of two norms."""
    model = plain_model("vit")
    anatomy = describe(model, "head")
    got = {name: torch.zeros(shape) for name, shape in anatomy.shapes.items()}
    proj, fc2 = "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight"
    got[proj].view(-1)[torch.arange(0, 70, 10)] = 1.0
    got[fc2].view(-1)[:40] = 1.0
    got["blocks.0.norm1.weight"][:13] = 1.0  # of 64
    got["blocks.0.norm2.weight"][:12] = 1.0
    sensitive = 7 + 40 + 13 + 12
    branch = 1 * (64 + anatomy.shapes[fc2][1])  # rank 1
    budget = 64 + 7 + branch + 64
    assert 40 * 10 >= branch > 7 * 10
    method = plan(got, model, anatomy, structure="lora", budget=budget, rank=1)
    assert method.structured == ("blocks.1.mlp.fc2",)
    assert method.places.keys() == {proj}
    assert method.places[proj].tolist() == list(range(0, 70, 10))
    assert method.whole == ("cls_token", "blocks.0.norm1.weight")
    assert sensitive < 2 * budget
    selection = method.base(anatomy)
    assert selection.places[proj] == Places(64, 64, torch.arange(0, 70, 10))
    assert isinstance(SPT.from_settings(method.name, method.settings(), method.arrays()), SPT)


def test_spt_plans_on_images_that_are_not_mixed(tmp_path: Path) -> None:
    """And draws nothing from the global random state: the plan with mixup on is the plan without it."""
    images = coloured_folder(tmp_path / "images")
    plans = []
    for settings in ({}, {"mixup": 0.8, "cutmix": 1.0}):
        work = prepare(tiny_recipe(images, method="spt-lora", spt_budget=8_000, rank=2, **settings))
        before = torch.get_rng_state()
        prepare_plan = METHODS["spt-lora"].prepare
        assert prepare_plan is not None
        plans.append(prepare_plan(Share(work, torch.device("cpu")), None))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = plans
    assert isinstance(first, SPT)
    assert isinstance(second, SPT)
    assert (first.structured, first.whole) == (second.structured, second.whole)
    assert first.places.keys() == second.places.keys() != set()
    assert all(torch.equal(first.places[name], second.places[name]) for name in first.places)
