"""A task that was tuned on quantised weights, met by the same backbone in full precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from fewtune.delta.contents import Contents
from fewtune.errors import DeltaError
from fewtune.quantised import dequantised, requantised, scheme

log = logging.getLogger("fewtune")


def quantised_anew(delta: Contents, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are in full precision in a model and were quantised for the task, quantised the same way.

    Raises:
        DeltaError: by a scheme that fewtune cannot quantise by. MissingExtra: the library that does is not installed.
    """
    anew = {}
    for name, words in delta.quantised.items():
        if scheme(tensors[name]) is None:
            made = requantised(tensors[name], words)
            if made is None:
                raise DeltaError(
                    f"the task was tuned on {name} of {words}, and in full precision the backbone cannot be told by "
                    "that: quantise it the same way first, or apply with verify='none'"
                )
            anew[name] = made
    return anew


@torch.no_grad()
def tell_difference(anew: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Says by how much the model's weights differ from those that were tuned on."""
    differences = {name: float((dequantised(made) - tensors[name]).abs().max()) for name, made in anew.items()}
    if differences:
        largest = max(differences, key=differences.__getitem__)
        log.warning(
            "the task was tuned on %d quantised weights that are in full precision here: apart from what was tuned "
            "they differ by at most %.2g (%s, whose largest is %.2g)",
            len(anew), differences[largest], largest, float(tensors[largest].abs().max()),
        )  # fmt: skip
