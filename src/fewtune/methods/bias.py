"""Bias tuning (BitFit, Ben Zaken et al. 2022): every bias and the head are trained."""

from __future__ import annotations

from torch import nn

from fewtune.neurons import Role, describe, owners
from fewtune.selection import Selection


def bias(model: nn.Module, head: tuple[str, ...]) -> Selection:
    """No connection, but all biases and the head; biases of normalisations too, unlike those that GPS trains.

    On ViT-B/16 with 100 classes: 179,812 parameters, as the paper counts.
    """
    anatomy = describe(model, head)
    held = owners(model)
    shifts = (name for name in anatomy.named(Role.NORM) if any(owner.attribute == "bias" for owner in held[name]))
    return Selection(anatomy, {}, {Role.BIAS: anatomy.named(Role.BIAS), Role.NORM: tuple(shifts)})
