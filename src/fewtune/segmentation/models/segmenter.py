"""A model that draws one mask, together with what it wants to see and which part of it is trained whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Segmenter:
    """A model, in eval mode, and all that is needed to make it again."""

    model: nn.Module
    """images [batch, 3, image_size, image_size] -> mask logits [batch, 1 or classes, h, w], at the model's own
    resolution."""
    source: str
    """Where it came from, with its prefix: "hf:facebook/sam-vit-base"."""
    head: tuple[str, ...]
    """Names of the modules that are trained whole and never selected from: the decoder."""
    image_size: int
    """Side of the square input, pixels; images are squeezed to it without cropping."""
    mean: tuple[float, ...]
    """Per channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    arguments: dict[str, Any] = field(default_factory=dict)
    """The arguments of `load_segmenter` beside source, able to go into JSON."""

    def describe(self) -> dict[str, Any]:
        """All but the weights, able to go into JSON; `segmenter_from_description` reads it."""
        return {
            "source": self.source,
            "arguments": dict(self.arguments),
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }
