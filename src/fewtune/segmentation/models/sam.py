"""Segment Anything (Kirillov et al. 2023) as a module that draws one mask an image, on transformers' SamModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from fewtune.errors import ModelError

DECODER_EPS = 1e-5
"""Of the norms in the mask decoder's transformer: the original's, with which the published weights were trained;
transformers' configuration says 1e-6, which moves logits in the fifth digit."""


class RelativeAttention(SamVisionAttention):  # type: ignore[misc]
    r"""SAM's attention without a matrix [tokens, tokens]: 4,096 x 4,096 a head at 1,024 px.

    The bias of a query at (y, x) and a key at (y', x') is the sum of two numbers, r(y') + s(x'), where r and s depend
    on the query only. Written as an inner product it goes into the queries and keys, and what is left is plain
    attention, which scaled_dot_product_attention computes block by block:

    .. math:: q \cdot k / \sqrt d + r_{y'} + s_{x'} = [q / \sqrt d, r, s] \cdot [k, e_{y'}, e_{x'}]

    For the layers that attend to the whole image: a window of 14 x 14 patches gains nothing by it.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
        batch, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, tokens, channels] each
        scaled = query * self.scale
        if self.use_rel_pos:
            scaled, key = self._with_positions(query, scaled, key, (height, width))
        channels = value.shape[-1]
        common = -(-scaled.shape[-1] // 8) * 8  # one width, of whole eights, is what the fused kernels take
        scaled, key, value = (F.pad(t, (0, common - t.shape[-1])) for t in (scaled, key, value))
        mixed = F.scaled_dot_product_attention(scaled, key, value, scale=1.0)[..., :channels]
        return self.proj(mixed.transpose(1, 2).reshape(batch, height, width, -1)), None

    def _with_positions(
        self, query: Tensor, scaled: Tensor, key: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Queries [q / sqrt d, r, s] and keys [k, e_y, e_x]."""
        height, width = size
        grid = query.unflatten(2, size)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative(self.rel_pos_h, height))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative(self.rel_pos_w, width))
        here: dict[str, Any] = {"dtype": key.dtype, "device": key.device}
        row = torch.eye(height, **here).repeat_interleave(width, 0)
        column = torch.eye(width, **here).repeat(height, 1)
        place = torch.cat([row, column], 1).expand(*key.shape[:2], -1, -1)
        return torch.cat([scaled, rows.flatten(2, 3), columns.flatten(2, 3)], -1), torch.cat([key, place], -1)


def _relative(table: Tensor, size: int) -> Tensor:
    """The embedding of every pair of places [query, key, channels] out of a table [2 size - 1, channels] of
    differences; a table of another size is resampled, as SAM does."""
    if table.shape[0] != 2 * size - 1:
        table = resampled_table(table, size)
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place[None, :] + size - 1]


def resampled_table(table: Tensor, size: int) -> Tensor:
    """A table of relative positions [2 n - 1, channels] for `size` places: [2 size - 1, channels]."""
    return F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T


class SamSegmenter(nn.Module):
    """images -> image encoder -> mask decoder -> the logits of one mask, with or without a prompt.

    Without a prompt the decoder sees no sparse embedding and the "no mask" embedding at every place, as in the paper.
    The prompt encoder is never trained: its weights are buffers here, so that no method can select or move them.
    """

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        self.sam = sam
        self.checkpointing = False
        for layer in sam.vision_encoder.layers:
            layer.attn.__class__ = SamVisionSdpaAttention if layer.window_size else RelativeAttention
        decoder: Any = sam.mask_decoder
        for layer in decoder.transformer.layers:
            for norm in (layer.layer_norm1, layer.layer_norm2, layer.layer_norm3, layer.layer_norm4):
                norm.eps = DECODER_EPS
        _parameters_to_buffers(sam.prompt_encoder)
        _parameters_to_buffers(sam.shared_image_embedding)

    def forward(
        self,
        images: Tensor,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
    ) -> Tensor:
        """Mask logits [batch, 1, S / 4, S / 4] of images [batch, 3, S, S].

        Args:
            images: normalised, of the model's size.
            boxes: one box an image, [batch, 4]: left, top, right, bottom in pixels of the input.
            points: [batch, points, 2]: x, y in pixels of the input.
            point_labels: [batch, points]: 1 on the object, 0 off it; all 1 where left out.

        Raises:
            ModelError: images of another size, prompts of another shape.
        """
        _check_prompts(images, boxes, points, point_labels)
        if points is not None and point_labels is None:
            point_labels = torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
        sparse, dense = self.sam.prompt_encoder(
            input_points=None if points is None else points[:, None],
            input_labels=None if point_labels is None else point_labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=None,
        )
        places = self.sam.get_image_wide_positional_embeddings()
        masks, _ = self.sam.mask_decoder(
            image_embeddings=self.encode(images),
            image_positional_embeddings=places.repeat(images.shape[0], 1, 1, 1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return masks[:, 0]  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> Tensor:
        """The image encoder's map [batch, channels, S / 16, S / 16]."""
        encoder: Any = self.sam.vision_encoder
        if tuple(images.shape[-2:]) != tuple(encoder.patch_embed.image_size):
            expected, got = encoder.patch_embed.image_size, tuple(images.shape[-2:])
            raise ModelError(
                f"this model takes images of {expected[0]} px, not {got[0]} x {got[1]}: "
                f"resize them, or load it with image_size={max(got)}"
            )
        hidden = encoder.patch_embed(images)
        if encoder.pos_embed is not None:
            hidden = hidden + encoder.pos_embed
        for layer in encoder.layers:
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return encoder.neck(hidden)  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        """The head, asked for in timm's words: the mask decoder."""
        return self.sam.mask_decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them (in eval mode too, where
        importance is computed)."""
        self.checkpointing = enable


def resize(sam: SamModel, image_size: int) -> None:
    """Make the model take images of another size, in place: position embeddings resampled (bicubic), and the
    relative-position tables of the layers that attend to the whole image (linear).

    Raises:
        ModelError: the size is no multiple of the patch size.
    """
    vision: Any = sam.config.vision_config
    prompt: Any = sam.config.prompt_encoder_config
    patch = int(vision.patch_size)
    if image_size % patch or image_size < patch:
        near = max(1, round(image_size / patch)) * patch
        raise ModelError(f"image_size={image_size}: SAM's must be a multiple of {patch}; the nearest is {near}")
    grid = image_size // patch
    encoder: Any = sam.vision_encoder
    if encoder.pos_embed is not None:
        positions = encoder.pos_embed.detach().permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=(grid, grid), mode="bicubic", antialias=True)
        encoder.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1).contiguous())
    for layer in encoder.layers:
        if layer.window_size == 0 and layer.attn.use_rel_pos:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = resampled_table(getattr(layer.attn, name).detach(), grid)
                setattr(layer.attn, name, nn.Parameter(table.contiguous()))
    encoder.image_size = vision.image_size = prompt.image_size = image_size
    encoder.patch_embed.image_size = (image_size, image_size)
    encoder.patch_embed.num_patches = grid * grid
    sam.prompt_encoder.image_embedding_size = (grid, grid)
    sam.prompt_encoder.input_image_size = image_size
    prompt.image_embedding_size = grid


def _parameters_to_buffers(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def _check_prompts(images: Tensor, boxes: Tensor | None, points: Tensor | None, labels: Tensor | None) -> None:
    batch = images.shape[0]
    if boxes is not None and tuple(boxes.shape) != (batch, 4):
        raise ModelError(f"boxes of shape {tuple(boxes.shape)}; expected one box an image, [{batch}, 4]")
    if points is not None and (points.ndim != 3 or points.shape[0] != batch or points.shape[-1] != 2):
        raise ModelError(f"points of shape {tuple(points.shape)}; expected [{batch}, points, 2]")
    if labels is not None and (points is None or labels.shape != points.shape[:2]):
        expected = "points with them" if points is None else str(list(points.shape[:2]))
        raise ModelError(f"point_labels of shape {tuple(labels.shape)}; expected {expected}")
