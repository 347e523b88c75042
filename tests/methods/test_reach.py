"""`reach`: training in the last blocks or stages only. Nothing below the border is trained, recorded or kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fewtune
from fewtune.errors import ConfigError, ModelError, SelectionError
from fewtune.methods.reach import below_reach, find_border
from fewtune.tasks import fit, load_task, prepare
from runs import coloured_folder, tiny_recipe


def hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "ViT": (lambda: timm.create_model("test_vit", num_classes=3, img_size=32), 2, "blocks.4"),
    "ViT of transformers": (hf_vit, 1, "vit.layers.2"),
    "Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=3, img_size=32, window_size=4, embed_dim=16, depths=(1, 2),
            num_heads=(2, 2),
        ),
        1,
        "layers.1.blocks.1",
    ),
    "ConvNeXt": (lambda: timm.create_model("test_convnext", num_classes=3), 2, "stages.2"),
    "EfficientNet": (lambda: timm.create_model("test_efficientnet", num_classes=3), 2, "blocks.3"),
    "ResNet of timm": (lambda: timm.create_model("test_resnet", num_classes=3), 1, "layer4"),
    "ResNet of torchvision": (lambda: torchvision.models.resnet18(num_classes=3), 1, "layer4"),
}  # fmt: skip


def output(model: nn.Module, images: Tensor) -> Tensor:
    got = model(images)
    return getattr(got, "logits", got)


@pytest.fixture(params=MODELS)
def attached(request: pytest.FixtureRequest) -> tuple[nn.Module, fewtune.Tuner, int]:
    make, reach, name = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    assert find_border(model, reach).name == name
    scores = fewtune.random_importance(model)
    tuner = fewtune.attach(model, fewtune.select(scores, k=1, exclude=below_reach(model, reach)))
    return model.train(), tuner, reach


def test_nothing_below_the_border_is_trained_or_kept_for_the_backward_pass(
    attached: tuple[nn.Module, fewtune.Tuner, int],
) -> None:
    model, tuner, reach = attached
    border = find_border(model, reach)
    below = tuple(f"{name}." for name in border.below)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved: list[Tensor] = []
    at_border: list[tuple[bool, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        at_border.append((given[0].requires_grad, len(saved)))

    handle = border.module.register_forward_pre_hook(look)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = output(model, torch.randn(4, 3, 32, 32)).square().mean()
    handle.remove()
    assert at_border == [(False, 0)]
    assert saved
    loss.backward()
    assert all(parameter.grad is not None for parameter in tuner.parameters())
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith(below)]  # running statistics included


def test_scores_above_the_border_are_those_of_the_whole_pass() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    batches = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3) for _ in range(2)]
    below = below_reach(model, 2)
    whole = fewtune.gradient_importance(model, batches)
    part = fewtune.gradient_importance(model, batches, exclude=below)
    assert set(part) == {name for name in whole if name.startswith(("blocks.4.", "blocks.5."))}
    assert all(torch.equal(part[name], whole[name]) for name in part)
    assert fewtune.select(part, k=1, exclude=below) == fewtune.select(whole, k=1, exclude=below)


def test_scores_of_some_weights_go_through_a_file(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    batches = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)]
    scores = fewtune.gradient_importance(model, batches, exclude=["blocks.0"])
    scores.save(tmp_path / "scores.safetensors")
    again, _ = fewtune.Scores.load(tmp_path / "scores.safetensors")
    assert list(again) == list(scores)


def test_a_run_trains_within_its_reach_and_its_task_file_is_exact(tmp_path: Path) -> None:
    recipe = tiny_recipe(coloured_folder(tmp_path / "images"), reach=2, epochs=1)
    result = fit(recipe, tmp_path / "run")
    delta = fewtune.load_delta(result.folder.delta)
    fresh = prepare(recipe).backbone.model
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    tuned = load_task(result.folder.delta).backbone.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert {name.partition(".")[0] for name in changed} <= {"blocks", "norm", "fc_norm", "head"}
    assert {int(name.split(".")[1]) for name in changed if name.startswith("blocks.")} == {4, 5}
    delta.apply(fresh)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in fresh.state_dict().items())
    delta.revert(fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_a_selection_that_trains_below_the_reach_is_refused(tmp_path: Path) -> None:
    data, file = coloured_folder(tmp_path / "images"), tmp_path / "selection.safetensors"
    model = prepare(tiny_recipe(data)).backbone.model
    fewtune.select(fewtune.random_importance(model), k=1).save(file)
    with pytest.raises(SelectionError, match=r"trains .*below reach=2"):
        fit(tiny_recipe(data, selection=str(file), reach=2), tmp_path / "run")


def test_what_cannot_be_reached_is_said(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit")
    with pytest.raises(ConfigError, match=r"reach=7: .* has 6 blocks; take 1 to 6"):
        below_reach(vit, 7)
    with pytest.raises(ModelError, match="name the modules to leave out: exclude"):
        below_reach(nn.Sequential(nn.Linear(2, 2)), 1)
    with pytest.raises(ConfigError, match="reach: method=full cannot leave modules out"):
        tiny_recipe(tmp_path, method="full", reach=1)
    with pytest.raises(ConfigError, match="reach=9"):
        fit(tiny_recipe(coloured_folder(tmp_path / "images"), reach=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()
