"""A backbone whose numbers no version of a library can change, for task files that older versions of fewtune wrote."""

from __future__ import annotations

import torch
from torch import nn

from methods_cases import plain_model


def steady_model() -> nn.Module:
    """A ViT of one block in float64, whose parameters are quotients of whole numbers, each its own."""
    model = plain_model("vit", depth=1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            count = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((((count * 37 + 11 * number) % 101 - 50) / 512).view_as(parameter))
    return model
