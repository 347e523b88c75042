"""Activation checkpointing: blocks compute their activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from torch import nn

from fewtune.errors import ConfigError


def recompute_activations(model: nn.Module, name: str) -> None:
    """Switch it on in a timm or transformers model, for training mode; ConfigError where `model` cannot do it."""
    for switch in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        found = getattr(model, switch, None)
        if callable(found):
            try:
                found()
            except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
                raise ConfigError(
                    f"{name} cannot recompute activations ({error}); leave checkpoint_activations out"
                ) from error
            return
    raise ConfigError(f"{name} cannot recompute activations; leave checkpoint_activations out")
