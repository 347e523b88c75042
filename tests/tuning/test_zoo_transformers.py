"""The zoo of transformers: tiny instances from configurations, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fewtune
from fewtune.importance import Scores
from zoo import CLASSES, Batch, Member, check_member, image, logits, parametrize

TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def member(architecture: type[nn.Module], configuration: type, size: int = 32, **options: Any) -> Member:
    """A member by its classes; options are the configuration's, but for those of `Member`."""
    own = {key: options.pop(key) for key in Member.__dataclass_fields__ if key in options}
    own.setdefault("inputs", image(size))
    return Member(lambda: architecture(configuration(num_labels=CLASSES, **options)), **own)


def tokens(generator: torch.Generator) -> dict[str, Tensor]:
    """Six sentences of eight tokens out of thirty."""
    ids = torch.randint(1, 30, (6, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by(
    outputs: Callable[[nn.Module, Any], Tensor], unreached: Mapping[str, str] | None = None
) -> Callable[[nn.Module, list[Batch]], Scores]:
    """Scores of a model that has no pooled features: the gradient of the outputs' cross-entropy."""

    def scores(model: nn.Module, batches: list[Batch]) -> Scores:
        def objective(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs(model, inputs), labels)

        return fewtune.gradient_importance(model, batches, objective, roles=dict.fromkeys(unreached or (), "other"))

    return scores


def masks(model: nn.Module, images: Tensor) -> Tensor:
    """The three masks that SAM proposes for a point, each by its mean, a class each."""
    points = torch.full((len(images), 1, 1, 2), 10.0, dtype=images.dtype)
    return model(pixel_values=images, input_points=points).pred_masks[:, 0].flatten(2).mean(2)


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """The pooled features, as if they were scores of classes."""
    return model(images).pooler_output


def sam() -> nn.Module:
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 48, "output_channels": 16}
    grid = {"image_size": 64, "patch_size": 16}
    configuration = transformers.SamConfig(
        vision_config=vision | grid | {"global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8},
        prompt_encoder_config=grid | {"hidden_size": 16, "image_embedding_size": 4, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 24, "iou_head_hidden_dim": 16},
    )
    return transformers.SamModel(configuration)


UNUSED_IN_SAM = {
    "prompt_encoder.mask_embed.*": "embeds a mask given as a prompt; a point is given",
    "mask_decoder.output_hypernetworks_mlps.0.*": "of the single mask, left out where three are proposed",
    "mask_decoder.iou_prediction_head.*": "judges the masks and does not change them",
}


def mixture(architecture: type[nn.Module], configuration: type, *unknown: str, **options: Any) -> Member:
    """A tiny mixture of experts; ``unknown``: ends of names of small bare parameters that stay frozen."""
    return member(
        architecture,
        configuration,
        inputs=tokens,
        scores=by(logits),
        unknown={f"*{end}": "the router and the sinks are bare parameters, frozen" for end in unknown},
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=2,
        experts_implementation="eager",  # the others know no float64
        pad_token_id=0,
        **options,
    )


ZOO: dict[str, Member] = {
    "ViT": member(transformers.ViTForImageClassification, transformers.ViTConfig, **TRANSFORMER),
    "DeiT": member(transformers.DeiTForImageClassification, transformers.DeiTConfig, **TRANSFORMER),
    "BEiT": member(
        transformers.BeitForImageClassification,
        transformers.BeitConfig,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        **TRANSFORMER,
    ),
    "Swin": member(
        transformers.SwinForImageClassification,
        transformers.SwinConfig,
        image_size=32,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "Swinv2": member(
        transformers.Swinv2ForImageClassification,
        transformers.Swinv2Config,
        image_size=32,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "ConvNeXt": member(
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig,
        64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
    ),
    "ConvNeXt V2": member(
        transformers.ConvNextV2ForImageClassification,
        transformers.ConvNextV2Config,
        64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
    ),
    "DINOv2": member(transformers.Dinov2ForImageClassification, transformers.Dinov2Config, **TRANSFORMER),
    "DINOv2 with registers": member(
        transformers.Dinov2WithRegistersForImageClassification, transformers.Dinov2WithRegistersConfig, **TRANSFORMER
    ),
    "DINOv3": member(
        transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, outputs=pooled, head=None, **TRANSFORMER
    ),
    "CLIP": member(
        transformers.CLIPVisionModelWithProjection,
        transformers.CLIPVisionConfig,
        projection_dim=CLASSES,
        outputs=lambda model, images: model(images).image_embeds,
        **TRANSFORMER,
    ),
    "SigLIP": member(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        outputs=pooled,
        **TRANSFORMER,
    ),
    "SegFormer": member(
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig,
        64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        scores=by(logits),
    ),
    "SAM": Member(sam, image(64), masks, scores=by(masks, UNUSED_IN_SAM), unreached=UNUSED_IN_SAM),
    "ResNet": member(
        transformers.ResNetForImageClassification,
        transformers.ResNetConfig,
        64,
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
    ),
    "BERT": member(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        inputs=tokens,
        scores=by(logits),
        vocab_size=30,
        max_position_embeddings=16,
        **{
            key: TRANSFORMER[key]
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        },
    ),
    "GPT-2": member(
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2Config,
        inputs=tokens,
        scores=by(logits),
        vocab_size=30,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=3,
        pad_token_id=0,
    ),
    "Mixtral": mixture(transformers.MixtralForSequenceClassification, transformers.MixtralConfig, "gate.weight"),
    "GPT-OSS": mixture(
        transformers.GptOssForSequenceClassification, transformers.GptOssConfig, "router.*", "sinks", head_dim=8
    ),
}


@parametrize(ZOO)
def test_zoo(name: str) -> None:
    check_member(ZOO[name])
