"""Visual prompt tuning in timm's Swin Transformer (Jia et al. 2022).

Prompts join every window as keys and values without relative position or mask. Deep: each block has its own, and what
becomes of them is dropped. Shallow: what attention makes of a prompt is averaged over the windows, goes through the
block's feed-forward, and where patches are merged a prompt stands for all four of them. (VPT's code lays the copies
of the prompts out by window, then image, and the windows by image, then window, so that behind the first block an image
sees other images' prompts; here each sees its own.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from fewtune.errors import ModelError, TuningError
from fewtune.methods.blocks import Block, find_trunk
from fewtune.methods.inserted import Added, adopt

ATTRIBUTE = "fewtune_prompts"
STREAM = "fewtune_stream"
LAST = "fewtune_last"


class Stream:
    """The prompts on their way through one forward pass.

    tokens: [B, P, D] as they stand between blocks. normed: what the present block's attention is given. mixed: what its
    attention made of them, where they go on.
    """

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on
        self.tokens: Tensor | None = None
        self.normed: Tensor | None = None
        self.mixed: Tensor | None = None


class PromptedWindowAttention(WindowAttention):
    """Window attention whose keys and values include the stream's prompts."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [images * windows, tokens, D], an image's windows together; mask: [windows, tokens, tokens] or None."""
        stream: Stream = getattr(self, STREAM)
        assert stream.normed is not None
        count = stream.normed.shape[1]
        windows = len(x) // len(stream.normed)
        together = torch.cat([stream.normed.repeat_interleave(windows, dim=0).to(x.dtype), x], dim=1)
        rows, tokens, _ = together.shape
        qkv = self.qkv(together).reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = F.pad(self._get_rel_pos_bias(), (count, 0, count, 0))
        if mask is not None:
            masks = F.pad(mask, (count, 0, count, 0)).to(bias.dtype)
            bias = bias + masks.repeat(rows // len(mask), 1, 1).unsqueeze(1)
        if not stream.goes_on:  # nobody asks what becomes of the prompts
            q, bias = q[:, :, count:], bias[:, :, count:]
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout)
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        if stream.goes_on:
            stream.mixed = torch.unflatten(x[:, :count], 0, (-1, windows)).mean(1)
            x = x[:, count:]
        return x


def into_windows(
    model: nn.Module, blocks: list[Block], make: Callable[[int], nn.Module], *, deep: bool, name: str
) -> Added:
    """Prompts into every window of every block; `make` gives those of a block of that width.

    Raises:
        ModelError: a block's attention is not timm's own.
    """
    stream = Stream(goes_on=not deep)
    added: dict[str, nn.Module] = {}
    for number, block in enumerate(blocks):
        attention = block.attention
        if type(attention) is not WindowAttention:
            raise ModelError(f"{name}: {block.name} has attention of another kind, {type(attention).__name__}")
        attention.__class__ = PromptedWindowAttention
        setattr(attention, STREAM, stream)
        setattr(block.module, STREAM, stream)
        setattr(block.module, LAST, block is blocks[-1])
        if deep or number == 0:
            assert isinstance(block.module, SwinTransformerBlock)
            prompts = make(block.module.dim)
            adopt(block.module, block.name, ATTRIBUTE, prompts, like=block.mlp)
            added[f"{block.name}.{ATTRIBUTE}"] = prompts
        block.module.register_forward_pre_hook(enter)
        block.module.register_forward_hook(leave)
    if not deep:
        for module in find_trunk(model, name)[1].modules():
            if isinstance(module, PatchMerging):
                setattr(module, STREAM, stream)
                module.register_forward_pre_hook(merge)
    return Added(added)


def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a block: its own prompts, where it has some, normalised as the image's tokens are."""
    stream: Stream = getattr(block, STREAM)
    prompts: nn.Module | None = getattr(block, ATTRIBUTE, None)
    if prompts is not None:
        stream.tokens = prompts(len(inputs[0]))
    elif stream.tokens is None:  # this block runs alone: for the backward pass, once more
        raise TuningError(
            "vpt-shallow in a Swin cannot recompute activations, since prompts come from the block before: leave "
            "checkpoint_activations out"
        )
    stream.normed = block.get_submodule("norm1")(stream.tokens)


def leave(block: nn.Module, inputs: object, output: Tensor) -> None:
    """Behind a block: where prompts go on, its residual connections for them."""
    stream: Stream = getattr(block, STREAM)
    mixed, stream.normed, stream.mixed = stream.mixed, None, None
    if mixed is None or getattr(block, LAST):
        stream.tokens = None
        return
    norm2, mlp, drop_path1, drop_path2 = map(block.get_submodule, ("norm2", "mlp", "drop_path1", "drop_path2"))
    tokens = stream.tokens + drop_path1(mixed)
    stream.tokens = tokens + drop_path2(mlp(norm2(tokens)))


def merge(merging: PatchMerging, inputs: object) -> None:
    """Before patches are merged: each prompt as if it stood in all four places."""
    stream: Stream = getattr(merging, STREAM)
    assert stream.tokens is not None
    stream.tokens = merging.reduction(merging.norm(torch.cat([stream.tokens] * 4, dim=-1)))
