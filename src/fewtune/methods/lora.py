"""LoRA (Hu et al. 2022), through Hugging Face PEFT: W x + (alpha / r) B A x, with B zero at the start.

On the projections that make queries and values; where one layer makes queries, keys and values (timm's ViT and Swin),
on that layer: r (D + 3D) parameters are as many as 2 r (D + D) for queries and values apart. A block without attention
(ConvNeXt) has it on the two layers of its feed-forward. PEFT wraps these layers; merged, they are plain again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fewtune.errors import MissingExtra
from fewtune.methods.base import Excluding, Settings
from fewtune.methods.blocks import find_blocks
from fewtune.methods.inserted import Added, Modules, inserting, where_allowed
from fewtune.neurons import Anatomy

ADAPTER = "default"
"""PEFT's name of the only set of matrices."""


@dataclass(frozen=True)
class LoRA(Modules):
    """rank: r. alpha: the scale is alpha / r; None: 1. exclude: glob patterns of modules that are left as they are."""

    rank: int = 16
    alpha: float | None = None
    exclude: tuple[str, ...] = ()

    name: ClassVar = "lora"

    def insert(self, model: nn.Module, anatomy: Anatomy) -> Added:
        """A and B beside the projections of every block.

        Raises:
            ModelError: the model has no block that is known.
            MissingExtra: PEFT is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise MissingExtra("peft", "peft") from None
        blocks = find_blocks(model, self.name)
        layers = {
            f"{block.name}.{path}": block.module.get_submodule(path)
            for block in blocks
            for path in block.parts.projections
        }
        targets = list(where_allowed(anatomy, self.exclude, layers))
        exactly = "|".join(map(re.escape, targets))  # a list would also match names that only end alike
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=exactly,
        )
        inject_adapter_in_model(config, model, ADAPTER)
        return Added(
            {
                f"{name}.{matrices}.{ADAPTER}": model.get_submodule(f"{name}.{matrices}.{ADAPTER}")
                for name in targets
                for matrices in ("lora_A", "lora_B")
            }
        )

    def fold(self, model: nn.Module, anatomy: Anatomy, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + (alpha / r) B A."""
        from peft.tuners.lora import LoraLayer

        layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        return {
            f"{name}.weight": plain[f"{name}.weight"] + layer.get_delta_weight(ADAPTER).detach()
            for name, layer in layers.items()
        }


class Rank(Settings):
    """Of low-rank branches."""

    rank: int | None = Field(None, gt=0, description="lora: r, 16; spt-adapter, spt-lora: inner width, 8")


class LoRASettings(Rank, Excluding):
    """Of LoRA."""

    alpha: float | None = Field(None, gt=0, description="lora: the scale is alpha / rank; left out, 1")


LORA = inserting("lora", LoRASettings, lambda s: LoRA(s.rank or LoRA.rank, s.alpha, s.exclude), LoRA)
