"""Reach: training in the last blocks or stages of a model only, so that the backward pass ends where they begin.

Transformers count in the blocks that `blocks.py` knows, convolutional networks in stages. What runs before the border
is frozen, computes no gradient and keeps nothing for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import nn

from fewtune.errors import ConfigError, ModelError
from fewtune.methods.base import Excluding, S, Settings
from fewtune.methods.blocks import KNOWN, find_blocks, find_trunk, lineage

STAGES: dict[str, tuple[str, ...]] = {
    "timm.models.convnext.ConvNeXt": ("stages",),
    "timm.models.efficientnet.EfficientNet": ("blocks",),
    "timm.models.resnet.ResNet": ("layer1", "layer2", "layer3", "layer4"),
    "torchvision.models.resnet.ResNet": ("layer1", "layer2", "layer3", "layer4"),
}
"""Class of a convolutional network -> the attribute that lists its stages, or one attribute a stage."""

Reach = int | Literal["half"]


class KeptSettings(Settings):
    """Whether what lies below the reach is computed once for each image, and kept."""

    keep_prefix: Literal["none", "float32", "float16"] = Field(
        "none", description="compute what the first trained block is given once for each image and keep it on disk; "
        "float16 takes half the space",
    )  # fmt: skip
    prefix_views: int | None = Field(
        None, gt=0, description="for augment=flip or fgvc: so many augmented views of each image are kept, one an epoch"
    )
    prefix_limit: float = Field(20.0, gt=0, description="GB that all that is kept may take")


@dataclass(frozen=True)
class Border:
    """Where training begins.

    name, module: the first block or stage that is trained.
    below: what runs before it, by name: the largest modules that lie wholly before the border, in their order.
    bare: names of the parameters that the modules around the border hold themselves (a class token, for instance).
    """

    name: str
    module: nn.Module
    below: dict[str, nn.Module]
    bare: tuple[str, ...]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names for `exclude`: the modules below the border that hold a parameter, and bare parameters."""
        return (*(name for name, module in self.below.items() if any(True for _ in module.parameters())), *self.bare)


def find_border(model: nn.Module, reach: Reach) -> Border:
    """Where the last `reach` blocks (of a convolutional network: stages) of a model begin; "half": half, rounded up.

    Raises:
        ModelError: blocks and stages of the model are not known.
        ConfigError: it has fewer than `reach` of them.
    """
    trunk, units, word = _units(model)
    reach = (len(units) + 1) // 2 if reach == "half" else reach
    if reach > len(units):
        raise ConfigError(f"reach={reach}: {type(model).__name__} has {len(units)} {word}; take 1 to {len(units)}")
    name = units[-reach]
    bare = tuple(
        _join(holder, attribute) for holder, _ in _path(trunk, name) for attribute in _bare(model.get_submodule(holder))
    )
    return Border(name, model.get_submodule(name), dict(_before(model, trunk, name)), bare)


def below_reach(model: nn.Module, reach: Reach) -> tuple[str, ...]:
    """Names of the modules and parameters before the last `reach` blocks or stages, as ``exclude=`` of
    `fewtune.select` and `fewtune.gradient_importance` takes them.

    Raises: as `find_border`.
    """
    return find_border(model, reach).frozen


def within_reach(settings: S, model: nn.Module) -> S:
    """A method's settings with what lies below their reach among the excluded modules.

    Raises: as `find_border`.
    """
    if not isinstance(settings, Excluding) or settings.reach is None:
        return settings
    below = below_reach(model, settings.reach)
    return settings.model_copy(update={"exclude": (*settings.exclude, *below)})


def count_units(model: nn.Module) -> int:
    """How many blocks or stages a reach counts in a model (what `benchmarks/speed` takes a half of); ModelError where
    they are not known."""
    return len(_units(model)[1])


def _units(model: nn.Module) -> tuple[str, list[str], str]:
    """Name of the image encoder, names of what a reach counts in it, and what that is called."""
    for trunk, module in model.named_modules():
        attributes = next((STAGES[cls] for cls in lineage(module) if cls in STAGES), None)
        if attributes is None:
            continue
        if len(attributes) > 1:
            return trunk, [_join(trunk, attribute) for attribute in attributes], "stages"
        (holder,) = attributes
        children = module.get_submodule(holder).named_children()
        return trunk, [_join(_join(trunk, holder), child) for child, _ in children], "stages"
    try:
        trunk, module = find_trunk(model, "reach")
        return trunk, [_join(trunk, block.name) for block in find_blocks(module, "reach")], "blocks"
    except ModelError:
        raise ModelError(
            f"reach: the blocks of {type(model).__name__} are not known; known are {KNOWN.partition(' (')[0]}, and "
            "the stages of ResNets. For any other model name the modules to leave out: exclude=['stem', 'layers.0']"
        ) from None


def _before(model: nn.Module, trunk: str, border: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the trunk that are registered before the border and do not hold it.

    The networks of the tables register their modules in the order in which they run.
    """
    for holder, step in _path(trunk, border):
        for child, module in model.get_submodule(holder).named_children():
            if child == step:
                break
            yield _join(holder, child), module


def _path(trunk: str, border: str) -> Iterator[tuple[str, str]]:
    """(name of a module that holds the border, its child on the way there), from the trunk down."""
    holder = trunk
    for step in border.removeprefix(trunk).strip(".").split("."):
        yield holder, step
        holder = _join(holder, step)


def _bare(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
