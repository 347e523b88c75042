"""Visual prompt tuning (Jia et al. 2022): learnt tokens beside those of the image.

Shallow: P tokens go in before the first block and through all of them. Deep: every block gets P tokens of its own in
place of those that came out of the block before. All are taken away behind the last block; since attention does not
heed the order of its tokens, they stand behind the image's. Prompts begin uniform in [-v, v] with
v = sqrt(6 / (3 h w + D)) for patches of h x w pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.methods import base
from fewtune.methods.blocks import Block, find_blocks, find_trunk
from fewtune.methods.inserted import Added, Modules, adopt, inserting
from fewtune.neurons import Anatomy

ATTRIBUTE = "fewtune_prompts"
COUNT = "fewtune_prompt_count"
DEFAULT = {"vpt-shallow": 200, "vpt-deep": 50}
"""Prompts of each, as in the paper's figure of costs; VPT itself chooses among 1, 5, 10, 50, 100, 200 for each task."""


class Prompts(nn.Module):
    """P learnt tokens of D numbers."""

    def __init__(self, count: int, width: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.dropout = dropout

    def forward(self, batch: int) -> Tensor:
        """[batch, P, D]; dropout draws for each image."""
        return F.dropout(self.tokens.expand(batch, -1, -1), self.dropout, self.training)


@dataclass(frozen=True)
class VPT(Modules):
    """prompts: P; None: 200 shallow, 50 deep. dropout: of the prompts, in training."""

    deep: bool
    prompts: int | None = None
    dropout: float = 0.1

    @property
    def name(self) -> str:  # type: ignore[override]
        """vpt-shallow or vpt-deep."""
        return "vpt-deep" if self.deep else "vpt-shallow"

    @property
    def count(self) -> int:
        """P."""
        return self.prompts or DEFAULT[self.name]

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """Prompts before the first block, or before every block.

        Raises:
            ModelError: the blocks have no attention over a sequence or windows that prompts could join.
        """
        blocks = find_blocks(model, self.name)
        kinds = {block.parts.tokens for block in blocks}
        if kinds == {"sequence"}:
            return self._into_sequence(model, blocks)
        if kinds == {"windows"}:
            from fewtune.methods.vpt_swin import into_windows

            return into_windows(model, blocks, partial(self.make, model), deep=self.deep, name=self.name)
        raise ModelError(
            f"{self.name} adds tokens to attention over all tokens (ViT) or over windows (Swin); the blocks of "
            f"{type(model).__name__} have neither: take another method"
        )

    def make(self, model: nn.Module, width: int) -> Prompts:
        """New prompts for a block of this width."""
        _, trunk = find_trunk(model, self.name)
        patches = next(module for module in trunk.modules() if isinstance(module, nn.Conv2d))
        bound = math.sqrt(6 / (3 * math.prod(patches.kernel_size) + width))
        return Prompts(self.count, width, bound, self.dropout)

    def _into_sequence(self, model: nn.Module, blocks: list[Block]) -> Added:
        added: dict[str, nn.Module] = {}
        for number, block in enumerate(blocks if self.deep else blocks[:1]):
            width = width_of(block)
            prompts = self.make(model, width)
            adopt(block.module, block.name, ATTRIBUTE, prompts, like=block.mlp)
            block.module.register_forward_pre_hook(replaced if number else appended)
            added[f"{block.name}.{ATTRIBUTE}"] = prompts
        last = blocks[-1].module
        setattr(last, COUNT, self.count)
        last.register_forward_hook(taken_away)
        return Added(added)


def width_of(block: Block) -> int:
    """Width of the tokens that a block is given."""
    layer = next(module for module in block.mlp.modules() if isinstance(module, nn.Linear))
    return layer.in_features


def appended(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before the first block: the image's tokens, then the prompts."""
    x = inputs[0]
    prompts = getattr(block, ATTRIBUTE)(len(x)).to(x.dtype)
    return (torch.cat([x, prompts], dim=1), *inputs[1:])


def replaced(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before every other block: its own prompts in place of the last ones."""
    x = inputs[0]
    prompts = getattr(block, ATTRIBUTE)(len(x)).to(x.dtype)
    return (torch.cat([x[:, : -prompts.shape[1]], prompts], dim=1), *inputs[1:])


def taken_away(block: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Behind the last block: the image's tokens alone."""
    return output[:, : -getattr(block, COUNT)]


class Settings(base.Settings):
    """Of prompts."""

    prompts: int | None = Field(None, gt=0, description="vpt-shallow: 200 where left out; vpt-deep: 50 a block")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="vpt-shallow, vpt-deep")


# Prompts beside the patches change what the head is given before anything is learnt.
VPT_SHALLOW = inserting(
    "vpt-shallow", Settings, lambda s: VPT(False, s.prompts, s.prompt_dropout), VPT, starts_plain=False
)
VPT_DEEP = inserting("vpt-deep", Settings, lambda s: VPT(True, s.prompts, s.prompt_dropout), VPT, starts_plain=False)
