"""Attach in one process: it trains what the dense mask trains, however the model is used, and leaves a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attaching import (
    CLASSES,
    Step,
    assert_trains_alike,
    batch,
    choose,
    cross_entropy_step,
    small_convnet,
    small_vit,
)
from fewtune.tuning import attach


def accumulated(model: nn.Module, step: int) -> None:
    for part in range(3):
        cross_entropy_step(model, 10 * step + part)


def two_forwards(model: nn.Module, step: int) -> None:
    images, labels = batch(step)
    other, _ = batch(step + 100)
    first, second = model(images), model(other)
    with torch.no_grad():
        model(images)
    (F.cross_entropy(first, labels) + (first - second).square().mean()).backward()


@pytest.mark.parametrize("step", [cross_entropy_step, accumulated, two_forwards])
@pytest.mark.parametrize("make", [small_vit, small_convnet])
def test_steps_are_those_of_the_dense_mask(make: Callable[[], nn.Module], step: Step) -> None:
    assert_trains_alike(make().double().eval(), step)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def step(model: nn.Module, number: int) -> None:
        images, labels = batch(number)
        x = model.patch_embed(images).requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        F.cross_entropy(model.head(model.norm(x).mean(1)), labels).backward()

    assert_trains_alike(small_vit(num_classes=CLASSES).double(), step)


def test_timm_gradient_checkpointing() -> None:
    model = small_vit().double()
    model.set_grad_checkpointing()
    assert_trains_alike(model)


class Reentered(nn.Module):
    """One layer used three times, once through its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x[..., :8].mean((1, 2))))
        return self.head(torch.tanh(F.linear(self.layer(x), self.layer.weight)))


class TiedLinears(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x[..., :8].mean((1, 2)))))))


class TiedEmbedding(nn.Module):
    """A language model's way: the look-up table is the last layer's weight."""

    sparse = False

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 8, sparse=self.sparse)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(2).mean(2) > 0).long() + (x.flatten(2).amax(2) > 2.5)
        return self.last(torch.tanh(self.middle(self.embedding(tokens).mean(1))))


class TiedSparseEmbedding(TiedEmbedding):
    """The same, with sparse gradients of the look-up."""

    sparse = True


class TiedTransposed(nn.Module):
    """An autoencoder: the decoder, which comes first in the model's order, has the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.encoder = nn.Conv2d(4, 4, 2, stride=2)
        self.encoder.weight = self.decoder.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
        return self.head(self.decoder(torch.tanh(self.encoder(x))).square().mean((2, 3)))


class TiedGroups(nn.Module):
    """Two convolutions of one weight, the first with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 4, 3, groups=2)
        self.whole = nn.Conv2d(4, 4, 3)
        self.whole.weight = self.grouped.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x, x[:, :2].square()], 1)
        return self.head(self.whole(torch.tanh(self.grouped(x))).mean((2, 3)))


@pytest.mark.parametrize(
    "model", [Reentered, TiedLinears, TiedEmbedding, TiedSparseEmbedding, TiedTransposed, TiedGroups]
)
def test_reentered_and_tied_modules(model: type[nn.Module]) -> None:
    torch.manual_seed(1)
    assert_trains_alike(model().double(), head=None if issubclass(model, TiedEmbedding) else "head")


def test_tied_weights_are_one_parameter() -> None:
    model = TiedLinears()
    tuner = attach(model, choose(model))
    assert model.first.weight_selected is model.second.weight_selected
    assert len(tuner.parameters()) == len({id(p) for p in model.parameters() if p.requires_grad})
    tuner.detach()
    assert model.first.weight is model.second.weight


def test_input_of_one_dimension_of_none_and_of_no_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    selection = choose(model, head=None)
    reference = copy.deepcopy(model)
    attach(model, selection)
    for shape in ((6,), (2, 3, 6), (0, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        model(x).sum().backward()
        reference(x).sum().backward()
    for name, places in selection.places.items():
        dense = reference.get_parameter(name).grad.reshape(-1)[places.flat]
        assert torch.allclose(model.get_parameter(name + "_selected").grad.reshape(-1), dense, rtol=0, atol=1e-12)


def test_dtypes_that_do_not_fit_are_refused_as_without_attach() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    attach(model, choose(model, head=None))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 6, dtype=torch.bfloat16))
