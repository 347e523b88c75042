"""The linear decoder over backbones of timm: ViT, Swin, ConvNeXt; what gives no feature map is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fewtune
from fewtune.errors import ConfigError, ModelError
from fewtune.models.hf import hf_map
from fewtune.neurons import Role, describe
from fewtune.segmentation.models import load_segmenter, segmenter_from_description
from segmenters import images, masks, objective

BACKBONES = {  # name: size, side of the last map, channels
    "timm:test_vit": (64, 4, 64),
    "timm:test_vit3": (64, 4, 96),  # pools by attention, whose weights no mask depends on
    "timm:test_convnext": (64, 2, 64),
    "timm:swin_tiny_patch4_window7_224": (64, 2, 768),
}


@pytest.mark.parametrize("source", BACKBONES)
def test_a_task_on_every_kind_of_backbone(source: str) -> None:
    size, side, channels = BACKBONES[source]
    segmenter = load_segmenter(source, image_size=size, pretrained=False)
    model, batch = segmenter.model, (images(size=size), masks(size=size))
    assert model(batch[0]).shape == (2, 1, side, side)
    assert model.decoder.weight.shape == (1, channels, 1, 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    scores = fewtune.gradient_importance(model, [batch], objective, head=segmenter.head)  # all weights are reached
    assert describe(model, segmenter.head).named(Role.HEAD) == ("decoder.weight", "decoder.bias")
    tuner = fewtune.attach(model, fewtune.select(scores, k=1))
    before = objective(model, *batch)
    before.backward()
    assert not [p for p in tuner.parameters() if p.grad is None]
    torch.optim.SGD(tuner.parameters(), lr=1e-3).step()
    assert objective(model, *batch) < before
    delta = tuner.delta()
    tuner.detach(keep=False)
    delta.apply(model)
    delta.revert(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
OF_TRANSFORMERS = {
    "ViT": TRANSFORMER | {"intermediate_size": 48},
    "Dinov2": TRANSFORMER,
    "Dinov2WithRegisters": TRANSFORMER,
    "ConvNext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64},
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
}


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_backbones_of_transformers(kind: str, tmp_path: Path) -> None:
    configuration = getattr(transformers, f"{kind}Config")(num_labels=3, **OF_TRANSFORMERS[kind])
    getattr(transformers, f"{kind}ForImageClassification")(configuration).save_pretrained(tmp_path)
    segmenter = load_segmenter(f"hf:{tmp_path}", image_size=64)
    model, batch = segmenter.model, (images(size=64), masks(size=64))
    side = {"ConvNext": 2, "Swin": 8}.get(kind, 4)
    assert model(batch[0]).shape == (2, 1, side, side)
    with torch.no_grad():
        for parameter in model.parameters():  # layer scales and attention start too small for a score
            parameter.add_(0.1 * torch.randn_like(parameter))
    scores = fewtune.gradient_importance(model, [batch], objective, head=segmenter.head)
    assert fewtune.select(scores, k=1).places.keys() == describe(model, segmenter.head).views.keys()


def test_tokens_become_a_map_row_by_row(tmp_path: Path) -> None:
    """The patch in which an image was changed is where the embedding of the patches changes most."""
    configuration = transformers.Dinov2WithRegistersConfig(num_labels=3, **TRANSFORMER)
    transformers.Dinov2WithRegistersForImageClassification(configuration).save_pretrained(tmp_path)
    model = load_segmenter(f"hf:{tmp_path}", image_size=64).model
    one = images(1, size=64)
    other = one.clone()
    other[..., 16:32, 48:64] += 3.0
    difference = (hf_map(model.backbone, one) - hf_map(model.backbone, other)).abs().sum(1)[0]
    assert divmod(int(difference.argmax()), 4) == (1, 3)


def test_features_are_the_normalised_patch_tokens() -> None:
    segmenter = load_segmenter("timm:test_vit", image_size=64, pretrained=False)
    backbone, x = segmenter.model.backbone, images(size=64)
    tokens = backbone.forward_features(x)[:, backbone.num_prefix_tokens :]
    expected = tokens @ segmenter.model.decoder.weight.flatten() + segmenter.model.decoder.bias
    torch.testing.assert_close(segmenter.model(x).flatten(1), expected)


def test_the_decoder_is_fresh_by_seed_and_the_inputs_are_the_backbones() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (load_segmenter("timm:test_vit", pretrained=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.model.decoder.weight, same.model.decoder.weight)
    assert not torch.equal(one.model.decoder.weight, other.model.decoder.weight)
    assert float(one.model.decoder.bias) == 0
    assert (one.mean, one.image_size, one.head) == ((0.5, 0.5, 0.5), 160, ("decoder",))


def test_a_description_makes_the_same_model() -> None:
    segmenter = load_segmenter("timm:test_vit", image_size=96, pretrained=False, seed=7)
    again = segmenter_from_description(json.loads(json.dumps(segmenter.describe())))
    assert again.describe() == segmenter.describe()
    assert torch.equal(again.model(images(size=96)), segmenter.model(images(size=96)))


def test_checkpointing() -> None:
    model = load_segmenter("timm:test_vit", image_size=64, pretrained=False).model
    plain = model(images(size=64))
    plain.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    calls: list[nn.Module] = []
    model.backbone.blocks[0].attn.register_forward_hook(lambda module, *_: calls.append(module))
    again = model(images(size=64))
    again.sum().backward()
    assert torch.equal(plain, again)
    assert len(calls) == 2  # once more in the backward pass
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("timm:test_vti", {}, ModelError, r'timm has no model "test_vti" \(did you mean .test_vit'),
        ("torchvision:resnet18", {}, ModelError, "does not give its feature maps; take a timm backbone"),
        ("demo:vit-smal", {}, ModelError, "did you mean 'demo:vit-small'"),
        ("timm:test_vit", {"image_size": 0}, ConfigError, "image_size must be at least 1 px, not 0"),
    ],
)
def test_what_cannot_be_had(source: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_segmenter(source, pretrained=False, **options)
