"""Tasks of any number of classes on one backbone: each is applied with its head, and taken out with it bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fewtune
from delta_cases import Task, made_up, same_bits, state
from fewtune.delta import Delta, applied, load_delta, swap
from fewtune.errors import DeltaError

CLASSES = 5


def _timm(name: str, **options: Any) -> Callable[[int], nn.Module]:
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes, **options)


def _transformers(classes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=classes,
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "timm ViT": _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2),
    "timm distilled DeiT": _timm(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2
    ),
    "timm ConvNeXt": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm EfficientNet": _timm("efficientnet_lite0"),
    "timm, convolution as head": _timm("mobilenetv2_050"),
    "transformers ViT": _transformers,
}


class Case:
    """A backbone with a head of five classes, and tasks of other numbers of classes on it."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = make(CLASSES).eval()
        self.make = make

    def twin(self, classes: int) -> nn.Module:
        """The same backbone with a head of another size, as a user would create it to train the task."""
        twin = self.make(classes).eval()
        own, theirs = self.model.state_dict(), twin.state_dict()
        twin.load_state_dict({n: own[n] if own[n].shape == t.shape else t for n, t in theirs.items()})
        return twin

    def task(self, classes: int, seed: int = 0) -> tuple[Delta, nn.Module]:
        """A task, and its tuned model."""
        twin = self.twin(classes)
        selection = fewtune.select(fewtune.random_importance(twin, seed=seed), k=1)
        task: Task = made_up(twin, selection, seed=seed + 1)
        twin.load_state_dict({n: task.tuned.get(n, t) for n, t in twin.state_dict().items()})
        return task.delta, twin


def logits(model: nn.Module) -> Tensor:
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(image)
    return output if isinstance(output, Tensor) else output.logits


def said(model: nn.Module) -> list[Any]:
    """All that a model says of its number of classes."""
    numbers: list[Any] = [
        [vars(m).get(a) for a in ("num_classes", "num_labels", "out_features", "out_channels")] for m in model.modules()
    ]
    config = getattr(model, "config", None)
    return [*numbers, getattr(config, "num_labels", None), copy.copy(getattr(config, "id2label", None))]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, says, held = state(model), said(model), [id(p) for p in model.parameters()]
    yield
    assert same_bits(state(model), before)
    assert said(model) == says
    assert [id(p) for p in model.parameters()] == held


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(MODELS[request.param])


@pytest.mark.parametrize("classes", [2, 5, 11])
def test_apply_and_revert(case: Case, classes: int, tmp_path: Path) -> None:
    delta, tuned = case.task(classes)
    delta.save(tmp_path / "task.safetensors")
    delta = load_delta(tmp_path / "task.safetensors")
    with unchanged(case.model):
        delta.apply(case.model)
        assert logits(case.model).shape == (2, classes)
        assert torch.equal(logits(case.model), logits(tuned))
        assert said(case.model) == said(tuned)
        assert not hasattr(tuned, "num_classes") or case.model.num_classes == classes
        delta.revert(case.model)
    assert logits(case.model).shape == (2, CLASSES)


def test_swap_and_applied_to_across_tasks(case: Case) -> None:
    tasks = [case.task(classes, seed) for seed, classes in enumerate((2, 11, 5, 2))]
    with unchanged(case.model):
        for delta, tuned in tasks:
            with delta.applied_to(case.model) as model:
                assert torch.equal(logits(model), logits(tuned))
    with unchanged(case.model):
        for delta, tuned in tasks:
            swap(case.model, delta)
            assert torch.equal(logits(case.model), logits(tuned))
            assert said(case.model) == said(tuned)
        applied(case.model).revert(case.model)


def test_a_swap_that_is_refused_leaves_the_task_of_another_size(case: Case) -> None:
    delta, tuned = case.task(2)
    other = Case(case.make)
    other.model = case.make(CLASSES).eval()  # other weights
    foreign, _ = other.task(11)
    with unchanged(case.model):
        delta.apply(case.model)
        before = logits(case.model)
        with unchanged(case.model), pytest.raises(DeltaError, match="another backbone"):
            delta.swap(case.model, foreign)
        assert torch.equal(logits(case.model), before)
        assert torch.equal(before, logits(tuned))
        delta.revert(case.model)


def test_merge_keeps_the_head(case: Case) -> None:
    delta, tuned = case.task(11)
    delta.merge(case.model)
    assert torch.equal(logits(case.model), logits(tuned))
    assert applied(case.model) is None


def test_the_model_may_be_cast_and_frozen_meanwhile() -> None:
    case = Case(MODELS["timm ViT"])
    delta, _ = case.task(11)
    expected = copy.deepcopy(case.model).double()
    delta.apply(case.model)
    case.model.double().requires_grad_(False)
    delta.revert(case.model)
    assert same_bits(state(case.model), state(expected))
    assert not any(p.requires_grad for p in case.model.parameters())


def test_another_head_meanwhile_is_noticed() -> None:
    case = Case(MODELS["timm ViT"])
    delta, _ = case.task(11)
    delta.apply(case.model)
    head = case.model.head
    case.model.head = copy.deepcopy(head)
    with pytest.raises(DeltaError, match=r"head\.weight was changed after the delta was applied"):
        delta.revert(case.model)


def test_trained_on_after_apply() -> None:
    """The head that was put in is an ordinary parameter: gradients reach it."""
    case = Case(MODELS["timm ViT"])
    delta, _ = case.task(11)
    delta.apply(case.model)
    case.model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert case.model.head.weight.grad.shape == (11, 24)
