"""The zoo of torchvision: small random instances, ``nn.MultiheadAttention`` among their layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.models import (
    convnext,
    efficientnet,
    maxvit,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
)

from zoo import CLASSES, Member, check_member, image, parametrize


def member(build: Callable[..., nn.Module], head: str | None, size: int = 64, **options: Any) -> Member:
    return Member(partial(build, num_classes=CLASSES, **options), image(size), head=head)


SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": [4, 4]}

ZOO: dict[str, Member] = {
    "vit": member(
        torchvision.models.VisionTransformer,
        "heads",
        32,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=48,
    ),
    "swin": member(torchvision.models.SwinTransformer, "head", 32, **SWIN),
    "swin_v2": member(
        torchvision.models.SwinTransformer,
        "head",
        32,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
        **SWIN,
    ),
    "maxvit": member(
        maxvit.MaxVit,
        "classifier",
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    ),
    "convnext": member(
        convnext.ConvNeXt,
        "classifier",
        block_setting=[convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)],
        layer_scale=0.1,
    ),
    "resnet": member(partial(resnet.ResNet, resnet.BasicBlock, [1, 1, 1, 1]), "fc"),
    "resnext": member(partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1]), "fc", groups=8, width_per_group=4),
    "efficientnet": member(
        efficientnet.EfficientNet,
        "classifier",
        inverted_residual_setting=[
            efficientnet.MBConvConfig(2, 3, 2, 8, 8, 1),
            efficientnet.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        ],
        dropout=0.0,
        last_channel=32,
    ),
    "mobilenet_v2": member(mobilenetv2.MobileNetV2, "classifier", width_mult=0.25),
    "mobilenet_v3": member(mobilenetv3.mobilenet_v3_small, "classifier", width_mult=0.25),
    "densenet": member(
        torchvision.models.DenseNet, "classifier", growth_rate=8, block_config=(1, 1, 1, 1), num_init_features=16
    ),
    "regnet": member(
        partial(
            regnet.RegNet, regnet.BlockParams([1] * 4, [8, 16, 24, 32], [8] * 4, [1.0] * 4, [2] * 4, se_ratio=0.25)
        ),
        "fc",
    ),
    "shufflenet": member(
        torchvision.models.ShuffleNetV2, "fc", stages_repeats=[1, 1, 1], stages_out_channels=[8, 16, 24, 32, 40]
    ),
}


@parametrize(ZOO)
def test_zoo(name: str) -> None:
    check_member(ZOO[name])
