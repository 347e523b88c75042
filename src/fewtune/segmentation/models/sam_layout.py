"""The original checkpoints of Segment Anything (`sam_vit_b_01ec64.pth`, …) under the names of transformers' SamModel.

Names of the original: github facebookresearch/segment-anything (Apache-2.0), build_sam.py and modeling/.
"""

from __future__ import annotations

import re

from torch import Tensor

State = dict[str, Tensor]

_LAYER = r"mask_decoder\.transformer\.layers\.(\d+)\."
_MLP = r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\."

RENAMED: tuple[tuple[str, str], ...] = (
    (r"image_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"image_encoder\.blocks\.(\d+)\.", r"vision_encoder.layers.\1."),
    (r"image_encoder\.patch_embed\.proj\.", r"vision_encoder.patch_embed.projection."),
    (r"image_encoder\.neck\.0\.", r"vision_encoder.neck.conv1."),
    (r"image_encoder\.neck\.1\.", r"vision_encoder.neck.layer_norm1."),
    (r"image_encoder\.neck\.2\.", r"vision_encoder.neck.conv2."),
    (r"image_encoder\.neck\.3\.", r"vision_encoder.neck.layer_norm2."),
    (r"image_encoder\.", r"vision_encoder."),
    (r"prompt_encoder\.point_embeddings\.", r"prompt_encoder.point_embed."),
    (r"prompt_encoder\.mask_downscaling\.0\.", r"prompt_encoder.mask_embed.conv1."),
    (r"prompt_encoder\.mask_downscaling\.1\.", r"prompt_encoder.mask_embed.layer_norm1."),
    (r"prompt_encoder\.mask_downscaling\.3\.", r"prompt_encoder.mask_embed.conv2."),
    (r"prompt_encoder\.mask_downscaling\.4\.", r"prompt_encoder.mask_embed.layer_norm2."),
    (r"prompt_encoder\.mask_downscaling\.6\.", r"prompt_encoder.mask_embed.conv3."),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", r"shared_image_embedding.positional_embedding"),
    (_LAYER + r"norm([1-4])\.", r"mask_decoder.transformer.layers.\1.layer_norm\2."),
    (r"mask_decoder\.transformer\.norm_final_attn\.", r"mask_decoder.transformer.layer_norm_final_attn."),
    (r"mask_decoder\.output_upscaling\.0\.", r"mask_decoder.upscale_conv1."),
    (r"mask_decoder\.output_upscaling\.1\.", r"mask_decoder.upscale_layer_norm."),
    (r"mask_decoder\.output_upscaling\.3\.", r"mask_decoder.upscale_conv2."),
    (_MLP + r"layers\.0\.", r"\1.proj_in."),
    (_MLP + r"layers\.1\.", r"\1.layers.0."),
    (_MLP + r"layers\.2\.", r"\1.proj_out."),
)
"""(how an original name begins, how it begins in transformers): the first that matches renames, other names stay."""

SHARED = "shared_image_embedding.positional_embedding"
SHARED_AGAIN = "prompt_encoder.shared_embedding.positional_embedding"


def is_original(state: State) -> bool:
    """Whether a checkpoint has the original's names."""
    return any(name.startswith("image_encoder.") for name in state)


def converted(state: State) -> State:
    """The state dict of transformers' SamModel; names that the original does not have are left as they are."""
    if is_original(state):
        state = {_renamed(name): tensor for name, tensor in state.items()}
    if SHARED in state:
        state = {SHARED_AGAIN: state[SHARED], **state}  # one matrix of random frequencies, which SamModel holds twice
    return state


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        new, count = re.subn("^" + pattern, replacement, name)
        if count:
            return new
    return name
