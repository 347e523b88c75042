"""The role of every parameter that is not a neuron's weight: a table (class, attribute) -> role.

Classes are named by module and qualified name and looked up along the method resolution order, so that neither timm
nor transformers is imported. A parameter that the table does not list has the role ``other``: it stays frozen and is
shown in a selection's summary.
"""

from __future__ import annotations

import copy
from enum import StrEnum

import torch
from torch import nn


class Role(StrEnum):
    """What a parameter is for; `select` decides by role what is trained whole."""

    BIAS = "bias"
    """Added to a neuron's output; biases of normalisations do not count (their role is norm)."""
    SCALE = "scale"
    """A trained gain of a branch or of neurons: layer scale, ConvNeXt's gamma, weight norm's magnitude."""
    NORM = "norm"
    """The affine parameters of a normalisation; the temperature of attention between normalised queries and keys."""
    RELATIVE_POSITION = "relative_position"
    """Relative-position tables added to attention."""
    EMBEDDING = "embedding"
    """Position embeddings, class and register tokens, look-up tables."""
    OTHER = "other"
    """All else."""
    HEAD = "head"
    """Inside the head: trained whole."""


_B, _S, _N, _R, _E = Role.BIAS, Role.SCALE, Role.NORM, Role.RELATIVE_POSITION, Role.EMBEDDING
ANY = "*"

_TORCH = "torch.nn.modules."
_TIMM = "timm.models."
_HF = "transformers.models."

ROLES: dict[str, dict[str, Role]] = {
    # torch
    _TORCH + "linear.Linear": {"bias": _B},
    _TORCH + "linear.Bilinear": {"bias": _B},
    _TORCH + "conv._ConvNd": {"bias": _B},
    _TORCH + "activation.MultiheadAttention": {"in_proj_bias": _B, "bias_k": _E, "bias_v": _E},
    _TORCH + "sparse.Embedding": {"weight": _E},
    _TORCH + "sparse.EmbeddingBag": {"weight": _E},
    _TORCH + "normalization.LayerNorm": {ANY: _N},
    _TORCH + "normalization.GroupNorm": {ANY: _N},
    _TORCH + "normalization.RMSNorm": {ANY: _N},
    _TORCH + "batchnorm._NormBase": {ANY: _N},
    # timm: layers
    "timm.layers.layer_scale.LayerScale": {"gamma": _S},
    "timm.layers.layer_scale.LayerScale2d": {"gamma": _S},
    "timm.layers.std_conv.ScaledStdConv2d": {"gain": _S},
    "timm.layers.std_conv.ScaledStdConv2dSame": {"gain": _S},
    "timm.layers.cond_conv2d.CondConv2d": {"bias": _B},  # its weights are experts, not neurons
    "timm.layers.grn.GlobalResponseNorm": {ANY: _N},
    "timm.layers.norm.RmsNorm": {ANY: _N},
    "timm.layers.norm.RmsNorm2d": {ANY: _N},
    "timm.layers.norm.RmsNormFp32": {ANY: _N},
    "timm.layers.norm.SimpleNorm": {ANY: _N},
    "timm.layers.norm.SimpleNorm2d": {ANY: _N},
    "timm.layers.norm_act.RmsNormAct": {ANY: _N},
    "timm.layers.norm_act.RmsNormAct2d": {ANY: _N},
    "timm.layers.evo_norm.EvoNorm2dB0": {ANY: _N},
    "timm.layers.evo_norm.EvoNorm2dB1": {ANY: _N},
    "timm.layers.evo_norm.EvoNorm2dB2": {ANY: _N},
    "timm.layers.evo_norm.EvoNorm2dS0": {ANY: _N},
    "timm.layers.evo_norm.EvoNorm2dS1": {ANY: _N},
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": {ANY: _N},
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": {ANY: _N},
    "timm.layers.inplace_abn.InplaceAbn": {ANY: _N},
    "timm.layers.attention_pool.AttentionPoolLatent": {"latent": _E, "pos_embed": _E},
    "timm.layers.attention_pool2d.AttentionPool2d": {"pos_embed": _E},
    "timm.layers.attention_pool2d.RotAttentionPool2d": {"pos_embed": _E},
    "timm.layers.halo_attn.PosEmbedRel": {ANY: _R},
    "timm.layers.bottleneck_attn.PosEmbedRel": {ANY: _R},
    "timm.layers.lambda_layer.LambdaLayer": {"pos_emb": _R},
    "timm.layers.pos_embed_rel.RelPosBias": {ANY: _R},
    "timm.layers.pos_embed_rel.RelPosBiasTf": {ANY: _R},
    "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed": {"freqs": _E},
    # timm: models
    _TIMM + "beit.Attention": {"q_bias": _B, "v_bias": _B, "relative_position_bias_table": _R},
    _TIMM + "beit.RelativePositionBias": {ANY: _R},
    _TIMM + "beit.Block": {"gamma_1": _S, "gamma_2": _S},
    _TIMM + "beit.Beit": {ANY: _E},
    _TIMM + "cait.Cait": {ANY: _E},
    _TIMM + "cait.LayerScaleBlock": {ANY: _S},
    _TIMM + "cait.LayerScaleBlockClassAttn": {ANY: _S},
    _TIMM + "coat.CoaT": {ANY: _E},
    _TIMM + "convit.ConVit": {ANY: _E},
    _TIMM + "convnext.ConvNeXtBlock": {"gamma": _S},
    _TIMM + "crossvit.CrossVit": {ANY: _E},
    _TIMM + "davit.DaVit": {ANY: _E},
    _TIMM + "edgenext.ConvBlock": {"gamma": _S},
    _TIMM + "edgenext.CrossCovarianceAttn": {"temperature": _N},
    _TIMM + "edgenext.SplitTransposeBlock": {ANY: _S},
    _TIMM + "efficientformer.Attention": {"attention_biases": _R},
    _TIMM + "efficientformer_v2.Attention2d": {"attention_biases": _R},
    _TIMM + "efficientformer_v2.Attention2dDownsample": {"attention_biases": _R},
    _TIMM + "efficientvit_msra.CascadedGroupAttention": {"attention_biases": _R},
    _TIMM + "efficientvim.EfficientViMBlock": {"alpha": _S},
    _TIMM + "eva.Eva": {ANY: _E},
    _TIMM + "eva.EvaAttention": {"q_bias": _B, "v_bias": _B},
    _TIMM + "eva.EvaBlock": {ANY: _S},
    _TIMM + "eva.EvaBlockPostNorm": {ANY: _S},
    _TIMM + "fastvit.LayerScale2d": {"gamma": _S},
    _TIMM + "gemma4_vit.Gemma4PatchEmbed": {"position_embedding_table": _E},
    _TIMM + "hgnet.LearnableAffineBlock": {"scale": _S, "bias": _B},
    _TIMM + "hiera.Hiera": {ANY: _E},
    _TIMM + "hieradet_sam2.HieraDet": {ANY: _E},
    _TIMM + "iformer.Residual": {"gamma": _S},
    _TIMM + "inception_next.MetaNeXtBlock": {"gamma": _S},
    _TIMM + "levit.Attention": {"attention_biases": _R},
    _TIMM + "levit.AttentionDownsample": {"attention_biases": _R},
    _TIMM + "metaformer.Scale": {"scale": _S},
    _TIMM + "metaformer.StarReLU": {"scale": _S, "bias": _B},
    _TIMM + "mlp_mixer.Affine": {ANY: _N},
    _TIMM + "mlp_mixer.ResBlock": {"ls1": _S, "ls2": _S},
    _TIMM + "mvitv2.MultiScaleAttention": {ANY: _R},
    _TIMM + "mvitv2.MultiScaleVit": {ANY: _E},
    _TIMM + "naflexvit.NaFlexEmbeds": {ANY: _E},
    _TIMM + "nest.NestLevel": {ANY: _E},
    _TIMM + "nfnet.NormFreeBlock": {"skipinit_gain": _S},
    _TIMM + "pit.PoolingVisionTransformer": {ANY: _E},
    _TIMM + "qwen3_vit.Qwen3VitEncoder": {"pos_embed": _E},
    _TIMM + "rdnet.DenseBlock": {"gamma": _S},
    _TIMM + "swiftformer.LayerScale2d": {"gamma": _S},
    _TIMM + "swin_transformer.WindowAttention": {"relative_position_bias_table": _R},
    _TIMM + "swin_transformer.SwinTransformer": {ANY: _E},
    _TIMM + "swin_transformer_v2.WindowAttention": {"q_bias": _B, "v_bias": _B, "logit_scale": _N},
    _TIMM + "swin_transformer_v2_cr.WindowMultiHeadAttention": {"logit_scale": _N},
    _TIMM + "tiny_vit.Attention": {"attention_biases": _R},
    _TIMM + "tnt.TNT": {ANY: _E},
    _TIMM + "visformer.Visformer": {ANY: _E},
    _TIMM + "vision_transformer.VisionTransformer": {ANY: _E},
    _TIMM + "vision_transformer.ResPostBlock": {ANY: _S},
    _TIMM + "vision_transformer_relpos.VisionTransformerRelPos": {ANY: _E},
    _TIMM + "vision_transformer_sam.Attention": {ANY: _R},
    _TIMM + "vision_transformer_sam.VisionTransformerSAM": {ANY: _E},
    _TIMM + "volo.VOLO": {ANY: _E},
    _TIMM + "xcit.ClassAttentionBlock": {ANY: _S},
    _TIMM + "xcit.XCA": {"temperature": _N},
    _TIMM + "xcit.XCABlock": {ANY: _S},
    _TIMM + "xcit.Xcit": {ANY: _E},
    "torch.nn.modules.rnn.RNNBase": {ANY: _B},
    "torch.nn.modules.rnn.RNNCellBase": {ANY: _B},
    # transformers
    "transformers.pytorch_utils.Conv1D": {"bias": _B},
    _HF + "aimv2.modeling_aimv2.Aimv2AttentionPoolingHead": {"cls_token": _E},
    _HF + "altclip.modeling_altclip.AltCLIPVisionEmbeddings": {ANY: _E},
    _HF + "beit.modeling_beit.BeitEmbeddings": {ANY: _E},
    _HF + "beit.modeling_beit.BeitLayer": {ANY: _S},
    _HF + "beit.modeling_beit.BeitRelativePositionBias": {ANY: _R},
    _HF + "blip.modeling_blip.BlipVisionEmbeddings": {ANY: _E},
    _HF + "blip_2.modeling_blip_2.Blip2VisionEmbeddings": {ANY: _E},
    _HF + "blip_2.modeling_blip_2.Blip2Model": {"query_tokens": _E},
    _HF + "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionEmbeddings": {ANY: _E},
    _HF + "clip.modeling_clip.CLIPVisionEmbeddings": {ANY: _E},
    _HF + "clipseg.modeling_clipseg.CLIPSegVisionEmbeddings": {ANY: _E},
    _HF + "convnext.modeling_convnext.ConvNextLayer": {ANY: _S},
    _HF + "convnextv2.modeling_convnextv2.ConvNextV2GRN": {ANY: _N},
    _HF + "cvt.modeling_cvt.CvtStage": {ANY: _E},
    _HF + "data2vec.modeling_data2vec_vision.Data2VecVisionEmbeddings": {ANY: _E},
    _HF + "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": {ANY: _S},
    _HF + "data2vec.modeling_data2vec_vision.Data2VecVisionRelativePositionBias": {ANY: _R},
    _HF + "deit.modeling_deit.DeiTEmbeddings": {ANY: _E},
    _HF + "dinov2.modeling_dinov2.Dinov2Embeddings": {ANY: _E},
    _HF + "dinov2.modeling_dinov2.Dinov2LayerScale": {ANY: _S},
    _HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersEmbeddings": {ANY: _E},
    _HF + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayerScale": {ANY: _S},
    _HF + "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayer": {ANY: _S},
    _HF + "dinov3_vit.modeling_dinov3_vit.DINOv3ViTEmbeddings": {ANY: _E},
    _HF + "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayerScale": {ANY: _S},
    _HF + "donut.modeling_donut_swin.DonutSwinEmbeddings": {ANY: _E},
    _HF + "donut.modeling_donut_swin.DonutSwinSelfAttention": {ANY: _R},
    _HF + "dpt.modeling_dpt.DPTViTEmbeddings": {ANY: _E},
    _HF + "dpt.modeling_dpt.DPTViTHybridEmbeddings": {ANY: _E},
    _HF + "focalnet.modeling_focalnet.FocalNetEmbeddings": {ANY: _E},
    _HF + "focalnet.modeling_focalnet.FocalNetLayer": {ANY: _S},
    _HF + "hiera.modeling_hiera.HieraEmbeddings": {ANY: _E},
    _HF + "ijepa.modeling_ijepa.IJepaEmbeddings": {ANY: _E},
    _HF + "levit.modeling_levit.LevitAttention": {"attention_biases": _R},
    _HF + "levit.modeling_levit.LevitAttentionSubsample": {"attention_biases": _R},
    _HF + "lw_detr.modeling_lw_detr.LwDetrViTEmbeddings": {ANY: _E},
    _HF + "lw_detr.modeling_lw_detr.LwDetrViTLayer": {ANY: _S},
    _HF + "maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention": {ANY: _R},
    _HF + "metaclip_2.modeling_metaclip_2.MetaClip2VisionEmbeddings": {ANY: _E},
    _HF + "mlcd.modeling_mlcd.MLCDVisionEmbeddings": {ANY: _E},
    _HF + "mlcd.modeling_mlcd.MLCDVisionModel": {"class_pos_emb": _E},
    _HF + "owlv2.modeling_owlv2.Owlv2VisionEmbeddings": {ANY: _E},
    _HF + "owlvit.modeling_owlvit.OwlViTVisionEmbeddings": {ANY: _E},
    _HF + "pixio.modeling_pixio.PixioEmbeddings": {ANY: _E},
    _HF + "poolformer.modeling_poolformer.PoolFormerLayer": {ANY: _S},
    _HF + "pvt.modeling_pvt.PvtPatchEmbeddings": {ANY: _E},
    _HF + "rf_detr.modeling_rf_detr.RfDetrDinov2Embeddings": {ANY: _E},
    _HF + "rf_detr.modeling_rf_detr.RfDetrDinov2LayerScale": {ANY: _S},
    _HF + "sam.modeling_sam.SamVisionAttention": {ANY: _R},
    _HF + "sam.modeling_sam.SamVisionEncoder": {ANY: _E},
    _HF + "sam.modeling_sam.SamPositionalEmbedding": {ANY: _E},
    _HF + "sam2.modeling_sam2.Sam2HieraDetModel": {ANY: _E},
    _HF + "sam2.modeling_sam2.Sam2Model": {"no_memory_embedding": _E},
    _HF + "sam3.modeling_sam3.Sam3ViTEmbeddings": {ANY: _E},
    _HF + "sam_hq.modeling_sam_hq.SamHQVisionAttention": {ANY: _R},
    _HF + "sam_hq.modeling_sam_hq.SamHQVisionEncoder": {ANY: _E},
    _HF + "sam_hq.modeling_sam_hq.SamHQPositionalEmbedding": {ANY: _E},
    _HF + "sapiens2.modeling_sapiens2.Sapiens2Embeddings": {ANY: _E},
    _HF + "sapiens2.modeling_sapiens2.Sapiens2LayerScale": {ANY: _S},
    _HF + "siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": {ANY: _E},
    _HF + "siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead": {ANY: _E},
    _HF + "swiftformer.modeling_swiftformer.SwiftFormerConvEncoder": {ANY: _S},
    _HF + "swiftformer.modeling_swiftformer.SwiftFormerEncoderBlock": {ANY: _S},
    _HF + "swiftformer.modeling_swiftformer.SwiftFormerLocalRepresentation": {ANY: _S},
    _HF + "swin.modeling_swin.SwinEmbeddings": {ANY: _E},
    _HF + "swin.modeling_swin.SwinSelfAttention": {"relative_position_bias_table": _R},
    _HF + "swin.modeling_swin.SwinRelativePositionBias": {ANY: _R},
    _HF + "swin2sr.modeling_swin2sr.Swin2SREmbeddings": {ANY: _E},
    _HF + "swin2sr.modeling_swin2sr.Swin2SRSelfAttention": {"logit_scale": _N},
    _HF + "swinv2.modeling_swinv2.Swinv2Embeddings": {ANY: _E},
    _HF + "swinv2.modeling_swinv2.Swinv2SelfAttention": {"logit_scale": _N},
    _HF + "timesformer.modeling_timesformer.TimesformerEmbeddings": {ANY: _E},
    _HF + "tipsv2.modeling_tipsv2.Tipsv2VisionEmbeddings": {ANY: _E},
    _HF + "tipsv2.modeling_tipsv2.Tipsv2VisionLayerScale": {ANY: _S},
    _HF + "videoprism.modeling_videoprism.VideoPrismSpatialEmbeddings": {ANY: _E},
    _HF + "videoprism.modeling_videoprism.VideoPrismTemporalEmbeddings": {ANY: _E},
    _HF + "videoprism.modeling_videoprism.VideoPrismMultiheadAttentionPoolingHead": {"pooling_attention_query": _E},
    _HF + "vit.modeling_vit.ViTEmbeddings": {ANY: _E},
    _HF + "vit_mae.modeling_vit_mae.ViTMAEEmbeddings": {ANY: _E},
    _HF + "vit_mae.modeling_vit_mae.ViTMAEDecoder": {ANY: _E},
    _HF + "vit_msn.modeling_vit_msn.ViTMSNEmbeddings": {ANY: _E},
    _HF + "vitdet.modeling_vitdet.VitDetEmbeddings": {ANY: _E},
    _HF + "vitdet.modeling_vitdet.VitDetAttention": {ANY: _R},
    _HF + "vivit.modeling_vivit.VivitEmbeddings": {ANY: _E},
    _HF + "yolos.modeling_yolos.YolosEmbeddings": {ANY: _E},
    _HF + "yolos.modeling_yolos.InterpolateMidPositionEmbeddings": {ANY: _E},
    # torchvision
    "torchvision.models.convnext.CNBlock": {"layer_scale": _S},
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": {"relative_position_bias_table": _R},
    "torchvision.models.swin_transformer.ShiftedWindowAttention": {"relative_position_bias_table": _R},
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": {"logit_scale": _N},
    "torchvision.models.video.mvit.MultiscaleAttention": {ANY: _R},
    "torchvision.models.video.mvit.PositionalEncoding": {ANY: _E},
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": {ANY: _R},
    "torchvision.models.vision_transformer.Encoder": {"pos_embedding": _E},
    "torchvision.models.vision_transformer.VisionTransformer": {"class_token": _E},
}


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Weights of all experts of a layer, stacked, as transformers keeps them; their biases are called ``…_bias``."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers' ``use_experts_implementation`` makes its classes hold them."""
    marked = {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()
    return marked and type(module).__module__.startswith("transformers.")


def listed_role(module: nn.Module, attribute: str) -> Role | None:
    """The table's role of ``module.attribute``, the most derived class first; None where it lists none."""
    if is_experts(module) and attribute in {f"{weight}_bias" for weight in EXPERT_WEIGHTS}:
        return Role.BIAS
    for cls in type(module).__mro__:
        entry = ROLES.get(qualified(cls), {})
        role = entry.get(attribute, entry.get(ANY))
        if role is not None:
            return role
    return None


def behaves_like_norm(module: nn.Module) -> bool:
    """Whether scaling the input of an unlisted module leaves its output unchanged, as only a normalisation does.

    Asked of leaf modules whose parameters are all vectors of one length C, with inputs [2, 3, C] and [2, C, 4, 4].
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    widths = {tuple(p.shape) for p in parameters}
    if next(module.children(), None) is not None or len(widths) != 1 or len(next(iter(widths))) != 1:
        return False
    (width,) = next(iter(widths))
    probe = copy.deepcopy(module).float().eval()
    if parameters[0].is_meta:
        probe.to_empty(device="cpu")
    for p in probe.parameters():
        nn.init.ones_(p.data)
    device = next(probe.parameters()).device
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, width), (2, width, 4, 4)):
        x = torch.randn(shape, generator=generator, device="cpu").to(device)
        try:
            with torch.no_grad():
                once, scaled = probe(x), probe(64.0 * x)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            continue  # not a module of one tensor of this shape
        same_shape = isinstance(once, torch.Tensor) and once.shape == x.shape
        if same_shape and not torch.allclose(once, x) and torch.allclose(once, scaled, atol=1e-3):
            return True
    return False
