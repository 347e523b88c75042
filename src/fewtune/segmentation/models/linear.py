"""The plainest segmenter: one linear layer on a backbone's last feature map, as a linear probe draws a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.models import Backbone, load_backbone
from fewtune.models.backbone import initialise_head, one_line, seeded
from fewtune.segmentation.models.segmenter import Segmenter


class LinearSegmenter(nn.Module):
    """images [batch, 3, H, W] -> a timm backbone's last map [batch, channels, h, w] -> 1 x 1 convolution -> logits.

    h and w are H and W over the backbone's stride: 14 or 16 for a ViT, 32 for Swin and ConvNeXt.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.decoder(last_map(self.backbone, images))
        return logits

    def get_classifier(self) -> nn.Module:
        """The head, asked for in timm's words."""
        return self.decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


def last_map(backbone: Any, images: Tensor) -> Tensor:
    """The last feature map [batch, channels, h, w] of a timm model, after its final normalisation."""
    (features,) = backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    return features  # type: ignore[no-any-return]


def load_linear(source: str, *, seed: int, **options: Any) -> Segmenter:
    """The backbone `source` of `fewtune.models.load_backbone`, its classifier cut off, with a fresh linear decoder.

    Raises:
        ModelError: the backbone is not known, or is no timm model that gives its feature maps.
    """
    loaded = load_backbone(source, num_classes=0, seed=seed, **options)
    backbone = without_head(loaded)
    channels = map_channels(backbone, loaded)
    with seeded(seed):
        model = LinearSegmenter(backbone, channels)
    initialise_head(model, ("decoder",), seed)
    return Segmenter(
        model=model.eval(),
        source=loaded.source,
        head=("decoder",),
        image_size=loaded.image_size,
        mean=loaded.mean,
        std=loaded.std,
        interpolation=loaded.interpolation,
    )


def without_head(loaded: Backbone) -> Any:
    """The backbone without its classifier and pooling, whose weights no mask depends on."""
    model: Any = loaded.model
    if not hasattr(model, "prune_intermediate_layers") or not hasattr(model, "forward_intermediates"):
        raise ModelError(
            f"{loaded.source} ({type(model).__name__}) does not give its feature maps; "
            "take a timm backbone that has forward_intermediates (ViT, Swin, ConvNeXt, …)"
        )
    model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
    return model


def map_channels(backbone: nn.Module, loaded: Backbone) -> int:
    """Channels of the last map, found by running one black image."""
    image = torch.zeros(1, 3, loaded.image_size, loaded.image_size)
    try:
        with torch.no_grad():
            return int(last_map(backbone.eval(), image).shape[1])
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"{loaded.source} gives no feature map for images of {loaded.image_size} px: {one_line(error)}"
        ) from error
