"""The masks that the published code makes of some gradients, against the selection made of the same.

What this is: an independent emulation of the published rule, written from its description (for every output neuron the
K inputs with the largest modulus of the gradient, which plain backward passes sum over the batches; a convolution
viewed as [out, the rest]), of which the gradients of two small models are recorded. What it is not: a run of the
published code, which is neither copied nor called here. Outside the tests the published code's own masks were compared
with ours once, with no place that differs; Swin's relative-position tables aside, which are not selected from here.

The gradients are recorded, so that neither a new torch nor a new timm moves them: run as a script, this file writes
them again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewtune import select
from fewtune.importance import Scores
from fewtune.neurons import describe

RECORDED = Path(__file__).parents[1] / "data_files" / "gradients"
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)},
    ),
}


def made(kind: str) -> nn.Module:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=3, **options).eval()


def official_masks(gradients: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """1 at the K largest |gradient| of each output neuron, of every weight of two dimensions or more."""
    masks = {}
    for name, gradient in gradients.items():
        rows = gradient.abs().view(gradient.shape[0], -1)
        mask = torch.zeros_like(rows)
        mask.scatter_(1, rows.topk(min(k, rows.shape[1]), dim=1).indices, 1.0)
        masks[name] = mask.view_as(gradient)
    return masks


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_no_place_differs(kind: str, k: int) -> None:
    gradients = load_file(RECORDED / f"{kind}.safetensors")
    anatomy = describe(made(kind))
    assert set(gradients) == set(anatomy.views)
    selection = select(Scores({name: gradients[name].abs() for name in anatomy.views}, anatomy), k=k)
    masks = official_masks(gradients, k)
    differing = 0
    for name, view in anatomy.views.items():
        ours = view.stored(selection.places[name].mask())
        differing += int((ours != masks[name].bool()).sum())
        assert int(ours.sum()) == view.neurons * min(k, view.fan_in)
    assert differing == 0
    assert selection.connections == sum(int(mask.sum()) for mask in masks.values())


def summed_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Plain backward passes of a supervised contrastive loss over four batches, without zeroing in between."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    same = (labels[:, None] == labels[None]) & ~torch.eye(6, dtype=torch.bool)
    for _ in range(4):
        images = torch.randn(6, 3, 16, 16, generator=draw)
        features = F.normalize(model.forward_head(model.forward_features(images), pre_logits=True), dim=1)
        logits = (features @ features.T / 0.07).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
        log_shares = logits.log_softmax(1).masked_fill(~same, 0.0)
        (-log_shares.sum(1) / same.sum(1)).mean().backward()
    names = describe(model).views
    return {name: p.grad.clone() for name, p in model.named_parameters() if name in names}


if __name__ == "__main__":
    RECORDED.mkdir(parents=True, exist_ok=True)
    for kind in MODELS:
        save_file(summed_gradients(made(kind)), RECORDED / f"{kind}.safetensors")
