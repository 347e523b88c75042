"""The zoo of timm: one small instance of each family of architectures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
from timm.layers import GatedMlp, GroupNormAct
from timm.models import (
    convmixer,
    densenet,
    focalnet,
    gcvit,
    levit,
    metaformer,
    mlp_mixer,
    mvitv2,
    nest,
    resnetv2,
    vgg,
    volo,
)
from torch import nn

from fewtune.tuning.tensors import Selected
from zoo import CLASSES, Member, check_member, image, parametrize


def family(model: str | Callable[..., nn.Module], size: int = 32, **options: Any) -> Member:
    """A member by timm's name of it or by its class; options are the model's own, but for those of `Member`."""
    own = {key: options.pop(key) for key in ("k", "dtype", "head", "unreached", "unknown", "dead") if key in options}
    create = partial(timm.create_model, model) if isinstance(model, str) else model
    return Member(partial(create, num_classes=CLASSES, **options), image(size), **own)


UNKNOWN: dict[str, dict[str, str]] = {
    "differential": {"*.attn.lambda_*": "vectors whose product weighs the second attention map"},
    "convit": {"*.gating_param": "a gate between attention by place and by content"},
    "swiftformer": {"*.w_g": "one vector that scores the queries"},
    "efficientvim": {
        "weights": "shares of the stages' heads in the output",
        "*.A": "the decay of the state space",
        "*.D": "the share of the hidden state that goes past the state space",
    },
}
"""Bare parameters without a known role, and what they are. They stay frozen."""


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2}
STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32)}

ZOO: dict[str, Member] = {
    # transformers of one resolution
    "vit": family("vit_tiny_patch16_224", **VIT),
    "vit with layer scale": family("vit_small_patch14_dinov2", **VIT),
    "vit with attention pooling": family("vit_base_patch16_siglip_224", **VIT),
    "vit rope": family("vit_small_patch16_rope_224", **VIT),
    "vit rope mixed": family("vit_small_patch16_rope_mixed_224", **VIT),
    "vit relpos": family("vit_relpos_small_patch16_224", **VIT),
    "vit srelpos": family("vit_srelpos_small_patch16_224", **VIT),
    "vit differential": family("vit_dlittle_patch16_reg1_gap_256", unknown=UNKNOWN["differential"], **VIT),
    "vit hybrid": family("vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=24, depth=1, num_heads=3),
    "deit distilled": family("deit_tiny_distilled_patch16_224", **VIT),
    "deit3": family("deit3_small_patch16_224", **VIT),
    "beit": family("beit_base_patch16_224", **VIT),
    "beitv2": family("beitv2_base_patch16_224", **VIT),
    "eva": family("eva_large_patch14_196", **VIT),
    "eva02": family("eva02_tiny_patch14_224", **VIT),
    "naflexvit": family("naflexvit_base_patch16_gap", patch_size=8, embed_dim=24, depth=2, num_heads=3),
    "samvit": family("samvit_base_patch16_224", **VIT),
    "cait": family("cait_xxs24_224", **VIT),
    "convit": family("convit_tiny", local_up_to_layer=1, unknown=UNKNOWN["convit"], **VIT),
    "tnt": family(
        "tnt_s_patch16_224", img_size=32, depth=2, embed_dim=24, inner_dim=8, num_heads_outer=3, num_heads_inner=2
    ),
    "volo": family(
        partial(volo.VOLO, (1, 1, 1, 1)),
        64,
        img_size=64,
        embed_dims=(16, 24, 24, 24),
        num_heads=(2, 2, 2, 2),
        stem_hidden_dim=16,
        head=("head", "aux_head"),
    ),
    "xcit": family("xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1),
    # transformers of several resolutions
    "swin": family("swin_tiny_patch4_window7_224", **SWIN),
    "swinv2": family("swinv2_tiny_window8_256", **SWIN),
    "swinv2 cr": family("swinv2_cr_tiny_224", **SWIN),
    "pvt_v2": family("pvt_v2_b0", 64, num_heads=(1, 2, 2, 2), **STAGES),
    "twins pcpvt": family("twins_pcpvt_small", 64, img_size=64, num_heads=(1, 2, 2, 2), **STAGES),
    "twins svt": family(
        "twins_svt_small",
        64,
        img_size=64,
        num_heads=(1, 2, 2, 2),
        wss=(4, 4, 2, 2),
        **STAGES | {"depths": (2, 1, 1, 1)},
    ),
    "coat": family(
        "coat_tiny",
        64,
        img_size=64,
        embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        num_heads=8,
    ),
    "crossvit": family(
        "crossvit_tiny_240",
        48,
        img_size=48,
        img_scale=(1.0, 32 / 48),
        embed_dim=(16, 24),
        depth=((1, 1, 0),),
        num_heads=(2, 2),
    ),
    "davit": family("davit_tiny", 64, num_heads=(2, 2, 2, 2), **STAGES),
    "mvitv2": family(
        mvitv2.MultiScaleVit, 64, cfg=mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=8), img_size=64
    ),
    "nest": family(nest.Nest, 64, img_size=64, embed_dims=(8, 16, 32), num_heads=(2, 2, 2), depths=(1, 1, 1)),
    "pit": family("pit_ti_224", 64, img_size=64, depth=(1, 1, 1), base_dims=(8, 8, 8), heads=(1, 2, 4)),
    "hiera": family("hiera_tiny_224", 64, img_size=64, embed_dim=8, stages=(1, 1, 1, 1)),
    "hieradet sam2": family(
        "sam2_hiera_tiny", 128, embed_dim=8, stages=(1, 1, 2, 1), window_spec=(4, 2, 2, 2), global_att_blocks=(3,)
    ),
    "focalnet": family(focalnet.FocalNet, 64, embed_dim=8, depths=(1, 1, 1, 1)),
    "gcvit": family(gcvit.GlobalContextVit, 64, img_size=64, embed_dim=8, depths=(2, 2, 2, 2), num_heads=(2, 2, 2, 2)),
    "visformer": family("visformer_tiny", 64, img_size=64, embed_dim=32, depth=(1, 1, 1), num_heads=2),
    "levit": family(
        levit.Levit, 128, img_size=128, embed_dim=(16, 24, 32), key_dim=8, depth=(1, 1, 1), num_heads=(2, 2, 2)
    ),
    "maxvit": family("test_maxvit", 64, img_size=64),
    "maxvit tf": family(
        "maxvit_tiny_tf_224", 64, img_size=64, embed_dim=(16, 16, 16, 32), depths=(1, 1, 1, 1), transformer_dim_head=8
    ),
    "coatnet": family("test_coatnet", 64, img_size=64),
    "tiny_vit": family("tiny_vit_5m_224", 64, num_heads=(2, 2, 2, 2), window_sizes=(4, 4, 2, 2), **STAGES),
    "edgenext": family("edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(2, 2, 2, 2)),
    "efficientformer": family("efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(8, 16, 24, 32)),
    "efficientformer v2": family(
        "efficientformerv2_s0", 64, img_size=64, depths=(1, 1, 2, 2), embed_dims=(8, 8, 16, 16), mlp_ratios=2
    ),
    "efficientvit mit": family(
        "efficientvit_b0", 128, widths=(8, 8, 16, 16, 32), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(32, 32)
    ),
    "efficientvit msra": family(
        "efficientvit_m0",
        256,
        img_size=256,
        embed_dim=(16, 32, 32),
        key_dim=(4, 4, 4),
        depth=(1, 1, 1),
        num_heads=(2, 2, 2),
        window_size=(4, 4, 4),
    ),
    "mobilevit": family("mobilevit_xxs", 64),
    "mobilevitv2": family("mobilevitv2_050", 128, width_factor=0.125),
    "swiftformer": family(
        "swiftformer_xs", 64, layers=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), unknown=UNKNOWN["swiftformer"]
    ),
    "shvit": family(
        "shvit_s1",
        128,
        embed_dim=(16, 24, 32),
        partial_dim=(4, 8, 8),
        qk_dim=(4, 4, 4),
        depth=(1, 1, 1),
        types=("i", "s", "s"),
    ),
    "efficientvim": family(
        "efficientvim_m1",
        128,
        embed_dim=(8, 16, 24),
        depths=(1, 1, 1),
        state_dim=(9, 9, 4),
        unknown=UNKNOWN["efficientvim"],
    ),
    "sequencer": family(
        "sequencer2d_s",
        img_size=32,
        embed_dims=(16, 16, 16, 16),
        hidden_sizes=(8, 8, 8, 8),
        layers=(1, 1, 1, 1),
    ),
    # perceptrons and other mixers
    "mixer": family(mlp_mixer.MlpMixer, **MIXER),
    "resmlp": family(
        mlp_mixer.MlpMixer, mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **MIXER
    ),
    "gmlp": family(
        mlp_mixer.MlpMixer, mlp_ratio=6, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, **MIXER
    ),
    "poolformer": family(
        metaformer.MetaFormer,
        64,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
        mlp_act=nn.GELU,
        dims=(8, 16, 24, 32),
        depths=(1, 1, 1, 1),
    ),
    "caformer": family(
        metaformer.MetaFormer,
        64,
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "convmixer": family(partial(convmixer.ConvMixer, 24, 2), patch_size=4),
    "mambaout": family("test_mambaout", 64),
    # convolutions
    "convnext": family("test_convnext", 64),
    "convnextv2": family("convnextv2_atto", 64, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "inception_next": family("inception_next_tiny", 64, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
    "fastvit": family("fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
    "resnet": family("test_resnet", 64),
    "resnetv2 with StdConv2d": family(
        partial(resnetv2.ResNetV2, (1, 1, 1, 1)),
        64,
        channels=(16, 32, 48, 64),
        stem_chs=16,
        norm_layer=partial(GroupNormAct, num_groups=4),
    ),
    "nfnet": family("test_nfnet", 64),
    "nf_regnet": family("nf_regnet_b0", 64, depths=(1, 1, 1, 1), channels=(16, 24, 32, 40)),
    "lambda_resnet": family("lambda_resnet26t", 64, width_factor=0.125),
    "halonet": family("halonet26t", 64, width_factor=0.125, self_attn_kwargs={"block_size": 2, "halo_size": 1}),
    "botnet": family("botnet26t_256", 64, img_size=64, width_factor=0.125),
    "byobnet": family("test_byobnet", 64),
    "mobileone": family("mobileone_s0", 64, width_factor=0.125, stem_chs=64),
    "regnet": family("regnetx_002", 64, depth=7, w0=8, wa=10, wm=2.0, group_size=8, stem_width=8),
    "efficientnet": family("test_efficientnet", 64),
    "efficientnet with SAME padding": family("test_efficientnet", 63, pad_type="same"),
    "efficientnet evonorm": family("test_efficientnet_evos", 64),
    "mobilenetv3": family("mobilenetv3_small_050", 64),
    "densenet": family(densenet.DenseNet, 64, growth_rate=8, block_config=(1, 1, 1, 1)),
    "repvit": family("repvit_m0_9", 64, embed_dim=(8, 16, 24, 32), depth=(1, 1, 1, 1)),
    "ghostnet": family("ghostnet_050", 64),
    "dla": family("dla46x_c", 64),
    "senet": family("legacy_seresnet18", 64, layers=(1, 1, 1, 1)),
    "res2net": family("res2net50_26w_4s", 64, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8),
    "starnet": family("starnet_s1", 64, base_dim=8, depths=(1, 1, 1, 1)),
    "rdnet": family("rdnet_tiny", 64, num_init_features=16, growth_rates=[8] * 7, num_blocks_list=[1] * 7),
    "fasternet": family("fasternet_t0", 64, embed_dim=8, depths=(1, 1, 1, 1)),
    "vgg": family(partial(vgg.VGG, [8, "M", 16, "M", 16, "M", 24, "M"]), 112, mlp_ratio=0.01),
}


@parametrize(ZOO)
def test_zoo(name: str) -> None:
    architecture = ZOO[name].build.args[0] if ZOO[name].build.func is timm.create_model else None  # type: ignore[attr-defined]
    if architecture is not None and not timm.is_model(architecture):
        pytest.skip(f"timm {timm.__version__} has no {architecture}")
    check_member(ZOO[name])


def test_zoo_notices_a_weight_that_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """BEiT calls ``F.linear`` with its layer's weight: a fast forward alone would train nothing there."""
    monkeypatch.setattr(Selected, "with_gradient", lambda self, values, frozen: frozen)
    with pytest.raises(AssertionError, match="has no gradient"):
        check_member(ZOO["beit"])
