"""Objectives: the scalar, of a model, its inputs and their labels, whose gradient is importance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.losses import supervised_contrastive_loss
from fewtune.neurons import ASK_MODEL, HeadSpec, find_head
from fewtune.sharded import is_unit, within_call

Objective = Callable[[nn.Module, Any, Tensor], Tensor]
Features = Callable[[nn.Module, Tensor], Tensor]


def pooled_features(model: nn.Module, images: Tensor, head: HeadSpec = ASK_MODEL) -> Tensor:
    """The pooled features before the head, [batch, width], from the model's own interface.

    timm: ``forward_head(forward_features(x), pre_logits=True)``; else what the head's first module is given; without
    a head, the ``pooler_output`` of a transformers model, or the output itself where it is [batch, width].

    Raises:
        ImportanceError: none of these gives a [batch, width]; pass ``features=``.
    """
    if is_unit(model):
        features = within_call(model, partial(_pooled_features, model, head), images)
    else:
        features = _pooled_features(model, head, model, images)
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ImportanceError(
            f"{type(model).__name__} gave pooled features {got}; expected [batch, width]: "
            "pass SupCon(features=callable(model, images))"
        )
    return features


def _pooled_features(model: nn.Module, head: HeadSpec, forward: Callable[..., Any], images: Tensor) -> Any:
    names = find_head(model, head)
    forward_features = getattr(model, "forward_features", None)
    forward_head = getattr(model, "forward_head", None)
    if callable(forward_features) and callable(forward_head) and "pre_logits" in _parameters_of(forward_head):
        return forward_head(forward_features(images), pre_logits=True)
    if names:
        return _input_of(model.get_submodule(names[0]), forward, images)
    output = forward(images)
    return output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)


def _parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _input_of(module: nn.Module, forward: Callable[..., Any], images: Tensor) -> Tensor | None:
    """What ``module`` is given when the model's forward runs on ``images``."""
    seen: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((*inputs, *named.values())[0])

    with module.register_forward_pre_hook(see, with_kwargs=True):
        forward(images)
    return seen[0].flatten(1) if seen else None


@dataclass(frozen=True)
class SupCon:
    """The supervised contrastive loss of a batch (Eq. 2), without any head.

    Inputs are images [batch, ...], or a pair of views of the same images, both contrasted with all.

    Under torch.distributed each process contrasts within its own batch: positives and negatives of other processes
    are not seen, so the batch that counts is the one of a process.

    Args:
        temperature: tau; the published code uses 0.07.
        base_temperature: tau_0, which only scales.
        features: (model, images) -> [batch, width]; the model's own pooled features where left out.
    """

    temperature: float = 0.07
    base_temperature: float = 0.07
    features: Features | None = None

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        views = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return self.of_features(self.embed(model, torch.cat(views)), torch.cat([labels] * len(views)))

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """What is contrasted of images [batch, ...]: features [batch, width]."""
        return (self.features or pooled_features)(model, images)

    def of_features(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features [batch, width] with labels [batch], or [batch, classes] of 0 and 1."""
        return supervised_contrastive_loss(features, labels, self.temperature, self.base_temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy through the model's head as it stands (the paper's "Head+CE" where the head is new)."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        views = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        output = model(torch.cat(views))
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits, labels.repeat(len(views)), label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of every class through the model's head, for images that may have any number of classes.

    Labels are 0 and 1, [batch, classes].
    """

    def __call__(self, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        views = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        output = model(torch.cat(views))
        logits = output if isinstance(output, Tensor) else output.logits
        return F.binary_cross_entropy_with_logits(logits, torch.cat([labels] * len(views)).to(logits))
