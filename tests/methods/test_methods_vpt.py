"""Visual prompts against the same computed plainly, token by token and window by window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewtune.methods import VPT, Inserted
from methods_cases import HEADS, output, pictures, plain_model


def prompted(kind: str, deep: bool, prompts: int = 3) -> tuple[nn.Module, list[Tensor]]:
    """A model with prompts in it (large ones, so that they matter), and the prompts of its blocks."""
    model = plain_model(kind)
    tuner = Inserted(model, (HEADS[kind],), VPT(deep, prompts, dropout=0.0))
    tokens = list(tuner.added.parameters().values())
    with torch.no_grad():
        for number, token in enumerate(tokens):
            token.copy_(torch.randn(token.shape, generator=torch.Generator().manual_seed(number)))
    return model, [token.detach() for token in tokens]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_in_a_vit_prompts_stand_between_class_token_and_patches(kind: str, deep: bool) -> None:
    model, prompts = prompted(kind, deep)
    plain = plain_model(kind)
    with torch.no_grad():
        x = plain._pos_embed(plain.patch_embed(pictures(kind)))
        first = plain.num_prefix_tokens
        x = torch.cat([x[:, :first], prompts[0].expand(len(x), -1, -1), x[:, first:]], dim=1)
        for number, block in enumerate(plain.blocks):
            if deep and number:
                x = torch.cat([x[:, :first], prompts[number].expand(len(x), -1, -1), x[:, first + 3 :]], dim=1)
            x = block(x)
        x = torch.cat([x[:, :first], x[:, first + 3 :]], dim=1)
        expected = plain.forward_head(plain.norm(x))
    got = output(model, kind)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert (got - output(plain, kind)).abs().max() > 1e-3


def attended(attention: nn.Module, tokens: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """Attention of one window, [count + tokens, D]: no position and no mask between prompts and the rest."""
    rows = len(tokens)
    q, k, v = attention.qkv(tokens).reshape(rows, 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) * attention.scale
    scores[:, count:, count:] += attention._get_rel_pos_bias()[0]
    if mask is not None:
        scores[:, count:, count:] += mask
    return attention.proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(rows, -1))


def block_by_hand(block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """One Swin block on one image, x [H, W, D] and prompts [P, D], a window at a time."""
    height, width, _ = x.shape
    (side, _), (shift, _) = block.window_size, block.shift_size
    count, normed = len(prompts), block.norm1(prompts)
    shifted = torch.roll(block.norm1(x), (-shift, -shift), (0, 1))
    result, of_prompts = torch.zeros_like(shifted), []
    for number, (top, left) in enumerate((a, b) for a in range(0, height, side) for b in range(0, width, side)):
        window = shifted[top : top + side, left : left + side].reshape(side * side, -1)
        mask = None if block.attn_mask is None else block.attn_mask[number]
        both = attended(block.attn, torch.cat([normed, window]), count, mask)
        of_prompts.append(both[:count])
        result[top : top + side, left : left + side] = both[count:].reshape(side, side, -1)
    x = x + torch.roll(result, (shift, shift), (0, 1))
    prompts = prompts + torch.stack(of_prompts).mean(0)
    return x + block.mlp(block.norm2(x)), prompts + block.mlp(block.norm2(prompts))


@pytest.mark.parametrize("deep", [False, True])
def test_in_a_swin_prompts_join_every_window(deep: bool) -> None:
    """Two images: neither sees the other's prompts on their way."""
    model, prompts = prompted("swin", deep)
    plain = plain_model("swin")
    expected, left = [], list(prompts)
    with torch.no_grad():
        for image in pictures("swin", 2):
            x, left, tokens = plain.patch_embed(image[None])[0], list(prompts), prompts[0]
            for stage in plain.layers:
                if isinstance(stage.downsample, nn.Identity):
                    merged = tokens
                else:
                    x = stage.downsample(x[None])[0]
                    merged = stage.downsample.reduction(stage.downsample.norm(torch.cat([tokens] * 4, -1)))
                tokens = merged
                for block in stage.blocks:
                    tokens = left.pop(0) if deep else tokens
                    x, tokens = block_by_hand(block, x, tokens)
            expected.append(plain.forward_head(plain.norm(x)[None])[0])
        got = model.eval()(pictures("swin", 2))
    assert any(block.attn_mask is not None for stage in plain.layers for block in stage.blocks)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_dropout_of_prompts_acts_in_training_only(kind: str) -> None:
    model = plain_model(kind)
    Inserted(model, (HEADS[kind],), VPT(deep=True, prompts=8, dropout=0.5))
    assert torch.equal(output(model, kind), output(model, kind))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(pictures(kind)), model(pictures(kind)))
