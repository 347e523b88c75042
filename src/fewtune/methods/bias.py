"""Bias tuning (BitFit, Ben Zaken et al. 2022): every bias and the head are trained."""

from __future__ import annotations

from torch import nn

from fewtune.methods.base import Excluding, selecting
from fewtune.neurons import Role, describe, excluded, owners
from fewtune.selection import Selection


def bias(model: nn.Module, head: tuple[str, ...], exclude: tuple[str, ...] = ()) -> Selection:
    """No connection, but all biases and the head; biases of normalisations too, unlike those that GPS trains.

    On ViT-B/16 with 100 classes: 179,812 parameters, as the paper counts.
    """
    anatomy = describe(model, head)
    held, left_out = owners(model), excluded(anatomy, exclude)
    shifts = (name for name in anatomy.named(Role.NORM) if any(owner.attribute == "bias" for owner in held[name]))
    named = {Role.BIAS: anatomy.named(Role.BIAS), Role.NORM: tuple(shifts)}
    return Selection(anatomy, {}, {role: tuple(n for n in names if n not in left_out) for role, names in named.items()})


BIAS = selecting("bias", lambda run: bias(run.model, run.head, run.settings(Excluding).exclude), Excluding)
