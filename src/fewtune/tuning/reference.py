"""Equations 5 and 6 as printed, with a dense mask: the ground truth of the tests, and the published code's cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewtune.selection import Selection


class DenseMask:
    r"""Trains a selection by full gradients multiplied by a 0/1 mask.

    .. math:: M_{ij} = 1 \text{ if } w_{ij} \text{ is selected, else } 0  \qquad (5)
    .. math:: W \leftarrow W - \epsilon \, \nabla W \odot M               \qquad (6)

    Eq. 6 is a step of plain gradient descent. For an optimiser that moves a weight whose gradient is zero (decay,
    momentum of an unmasked past) `restore_unselected` takes that movement back, so that the unselected weights are
    frozen as the equation says.

    Example: ``loss.backward(); dense.mask_gradients(); optimizer.step(); dense.restore_unselected()``.
    """

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        named = dict(model.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.masked: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, places in selection.places.items():
            weight = named[name]
            mask = selection.anatomy.views[name].stored(places.mask()).to(weight.device)  # Eq. 5
            self.masked.append((weight, mask, weight.detach().clone()))
        self.whole = [named[name] for name in (*selection.whole, *selection.head)]
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """Whole weights: this is what makes the dense way dense."""
        return [weight for weight, _, _ in self.masked] + self.whole

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Nabla W becomes nabla W * M (Eq. 6)."""
        for weight, mask, _ in self.masked:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def restore_unselected(self) -> None:
        """Unselected entries become the pretrained ones again."""
        for weight, mask, before in self.masked:
            weight.copy_(torch.where(mask, weight, before))
