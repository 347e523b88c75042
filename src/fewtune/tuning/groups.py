"""Parameter groups for an optimiser: the backbone's and the head's, each with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

ParamGroup = dict[str, list[nn.Parameter] | float]
"""What torch's optimisers call a group: "params", and "lr" where one is given."""


def param_groups(
    named: Mapping[str, nn.Parameter], head: Collection[str], lr: float | None, head_lr: float | None
) -> list[ParamGroup]:
    """Two groups, backbone and head; an empty one is left out.

    Args:
        named: what is trained, by name.
        head: names of the head's parameters.
        lr: learning rate of the backbone; None leaves it to the optimiser.
        head_lr: learning rate of the head; left out, `lr`.
    """
    groups: list[ParamGroup] = []
    for rate, inside in ((lr, False), (head_lr if head_lr is not None else lr, True)):
        parameters = [parameter for name, parameter in named.items() if (name in head) is inside]
        if parameters:
            groups.append({"params": parameters} | ({} if rate is None else {"lr": rate}))
    return groups
