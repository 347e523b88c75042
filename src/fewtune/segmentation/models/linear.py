"""The plainest segmenter: one linear layer on a backbone's last feature map, as a linear probe draws a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ModelError, one_line
from fewtune.models import load_backbone
from fewtune.models.backbone import initialise_head, seeded
from fewtune.segmentation.models.segmenter import Segmenter

FeatureMap = Callable[[Any, Tensor], Tensor]


class LinearSegmenter(nn.Module):
    """images [batch, 3, H, W] -> a backbone's last map [batch, channels, h, w] -> 1 x 1 convolution -> logits.

    h and w are H and W over the backbone's stride: 14 or 16 for a ViT, 32 for Swin and ConvNeXt.

    Args:
        backbone: of timm or transformers.
        feature_map: (backbone, images) -> its last map.
        channels: of that map.
    """

    def __init__(self, backbone: nn.Module, feature_map: FeatureMap, channels: int, classes: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_map = feature_map
        self.decoder = nn.Conv2d(channels, classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.feature_map(self.backbone, images))
        return logits

    def get_classifier(self) -> nn.Module:
        """The head, asked for in timm's words."""
        return self.decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them (transformers' models: in
        training mode only)."""
        backbone: Any = self.backbone
        if hasattr(backbone, "set_grad_checkpointing"):
            backbone.set_grad_checkpointing(enable)
        elif enable:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            backbone.gradient_checkpointing_disable()


def load_linear(source: str, *, architecture: str | None, seed: int, classes: int = 1, **options: Any) -> Segmenter:
    """The backbone `source` of `fewtune.models.load_backbone`, its classifier cut off, with a fresh linear decoder.

    Raises:
        ModelError: the backbone is not known, or does not give its feature maps.
    """
    loaded = load_backbone(source, num_classes=0, architecture=architecture, seed=seed, **options)
    if loaded.features is None:
        raise ModelError(
            f"{loaded.source} ({type(loaded.model).__name__}) does not give its feature maps; take a timm backbone "
            "that has forward_intermediates (ViT, Swin, ConvNeXt, …)"
        )
    backbone, feature_map = loaded.features.body(loaded.model), loaded.features.last_map
    channels = _channels(backbone, feature_map, loaded.image_size, loaded.source)
    with seeded(seed):
        model = LinearSegmenter(backbone, feature_map, channels, classes)
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


def _channels(backbone: nn.Module, feature_map: FeatureMap, image_size: int, source: str) -> int:
    """Channels of the last map, found by running one black image."""
    image = torch.zeros(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            return int(feature_map(backbone.eval(), image).shape[1])
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{source} gives no feature map for images of {image_size} px: {one_line(error, 160)}"
        ) from error
