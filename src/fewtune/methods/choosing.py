"""From a recipe's method to a tuner, and from a task file's to a method: the only matches of their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fewtune.config import Recipe
from fewtune.errors import DeltaError
from fewtune.methods.adapter import Adapter
from fewtune.methods.bias import bias
from fewtune.methods.full import Full
from fewtune.methods.inserted import Inserted
from fewtune.methods.linear import linear
from fewtune.methods.lora import LoRA
from fewtune.methods.placing import Method
from fewtune.methods.spt import SPT
from fewtune.methods.ssf import SSF
from fewtune.methods.vpt import VPT
from fewtune.selection import Selection
from fewtune.tuning import attach

SPT_RANK = 8
"""The inner width of SPT's branches where the recipe says none."""


def tuner_for(
    recipe: Recipe,
    model: nn.Module,
    head: tuple[str, ...],
    *,
    original: Callable[[], nn.Module],
    selection: Callable[[], Selection],
    plan: Callable[[], SPT],
) -> Any:
    """The tuner of a recipe's method, attached to a model of any task.

    Args:
        recipe: its method and the method's settings.
        model: plain and on its device.
        head: names of the modules that are trained whole: the classifier, or a segmenter's decoder.
        original: makes the untouched model once more (full, for the task file).
        selection: gives the connections (gps); called only where it is needed.
        plan: says where SPT's budget went (spt-adapter, spt-lora); called only where it is needed.

    Returns:
        What the trainer knows: named_parameters(), parameters(), param_groups(lr, head_lr), state_dict(),
        load_state_dict(), sync(), delta(metadata), trained, backbone_parameters.

    Raises:
        ModelError: the method does not know the model's architecture.
    """
    method: Method
    match recipe.method:
        case "full":
            return Full(model, head, original=original)
        case "bias":
            return attach(model, bias(model, head))
        case "linear":
            return attach(model, linear(model, head))
        case "gps":
            return attach(model, selection())
        case "adapter":
            method = Adapter(recipe.bottleneck, recipe.adapter_after)
        case "lora":
            method = LoRA(recipe.rank or LoRA.rank, recipe.alpha)
        case "vpt-shallow" | "vpt-deep":
            method = VPT(recipe.method == "vpt-deep", recipe.prompts, recipe.prompt_dropout)
        case "ssf":
            method = SSF()
        case "spt-adapter" | "spt-lora":
            method = plan()
    return Inserted(model, head, method, seed=recipe.seed)


def method_from(name: str, settings: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Method:
    """The method of a task file.

    Raises:
        DeltaError: there is no such method. TypeError: the settings are not its own.
    """
    match name:
        case "adapter":
            return Adapter(**settings)
        case "lora":
            return LoRA(**settings)
        case "vpt-shallow" | "vpt-deep":
            return VPT(**settings)
        case "ssf":
            return SSF(**settings)
        case "spt-adapter" | "spt-lora":
            return SPT.from_settings(name, settings, arrays)
    raise DeltaError(f"the task file is of the method {name!r}, which this fewtune does not know: update fewtune")
