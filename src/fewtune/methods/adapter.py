"""Adapters (Houlsby et al. 2019): small bottlenecks with a residual connection behind the branches of each block.

A bottleneck is h + W_up gelu(W_down h + b_down) + b_up, with W_up and b_up zero at the start, so that the model begins
as it was. Houlsby et al. put one behind attention and one behind the feed-forward; the tables of VPT, SSF and GPS count
one a block, behind the feed-forward (Pfeiffer et al. 2021), with a 64th of the block's width: 230,544 parameters in
ViT-B/16. VPT's code starts both matrices at zero, where their gradients vanish; ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewtune.errors import ModelError
from fewtune.methods.base import Excluding
from fewtune.methods.blocks import find_blocks, last_layer, width_and_axis
from fewtune.methods.inserted import Added, Modules, inserting, place, where_allowed
from fewtune.neurons import Anatomy

REDUCTION = 64
ATTRIBUTE = "fewtune_adapter"


class Bottleneck(nn.Module):
    """[..., width, ...] -> the same shape; `axis` is the axis of the channels."""

    def __init__(self, width: int, bottleneck: int, axis: int = -1) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.axis = axis
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """h + up(gelu(down(h)))."""
        change: Tensor = self.up(F.gelu(self.down(h.movedim(self.axis, -1))))
        return h + change.movedim(-1, self.axis)


def adapted(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The forward hook: the branch's output through its adapter."""
    adapter: Callable[[Tensor], Tensor] = getattr(module, ATTRIBUTE)
    if isinstance(output, tuple):  # transformers' attention gives its weights beside its output
        return (adapter(output[0]), *output[1:])
    return adapter(output)


@dataclass(frozen=True)
class Adapter(Modules):
    """bottleneck: its width; None: a 64th of the block's. after: behind which branches of a block. exclude: glob
    patterns of modules behind whose last layer there is none."""

    bottleneck: int | None = None
    after: Literal["mlp", "both"] = "mlp"
    exclude: tuple[str, ...] = ()

    name: ClassVar = "adapter"

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """One adapter behind the feed-forward of every block, and where asked one behind its attention.

        Raises:
            ModelError: the model has no block that is known, or a block has no attention.
        """
        branches: dict[str, nn.Module] = {}
        for block in find_blocks(model, self.name):
            if self.after == "both":
                if block.attention is None:
                    raise ModelError(
                        f"{block.name} has no attention to put an adapter behind; leave adapter_after at mlp"
                    )
                branches[f"{block.name}.{block.parts.attention}"] = block.attention
            branches[f"{block.name}.{block.parts.mlp}"] = block.mlp
        layers: dict[str, nn.Module] = {}
        behind: dict[str, str] = {}
        for name, branch in branches.items():
            inner, layer = last_layer(branch)
            path = f"{name}.{inner}" if inner else name
            layers[path], behind[path] = layer, name
        added: dict[str, nn.Module] = {}
        for path, layer in where_allowed(anatomy, self.exclude, layers).items():
            name = behind[path]
            width, axis = width_and_axis(layer)
            bottleneck = Bottleneck(width, self.bottleneck or max(1, width // REDUCTION), axis)
            added |= place(branches[name], name, ATTRIBUTE, bottleneck, adapted, like=layer)
        return Added(added)


class Settings(Excluding):
    """Of adapters."""

    bottleneck: int | None = Field(None, gt=0, description="adapter: inner width; left out, a 64th of the block's")
    adapter_after: Literal["mlp", "both"] = Field("mlp", description="both: behind attention too (Houlsby)")


ADAPTER = inserting("adapter", Settings, lambda s: Adapter(s.bottleneck, s.adapter_after, s.exclude), Adapter)
