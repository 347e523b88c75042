"""A pretrained model together with what it wants to see and where its head is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ConfigError, ModelError, Progress

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadOptions:
    """How a backbone is loaded, whatever its source.

    num_classes: size of the fresh head; None keeps the model's own head; 0 leaves it out where the library has models
        without one.
    image_size: side of the input in pixels; None means the model's own.
    pretrained: False leaves the weights random (deterministic by `seed`), the same on every call.
    drop_path: rate of stochastic depth, for the models that have it.
    architecture: for "file:" the model whose weights the file holds, "timm:NAME" for instance.
    seed: of the fresh head; the caller's random state is not touched.
    quantise: how the weights of linear layers outside the head are kept, a key of `fewtune.quantised.SCHEMES`; None
        leaves them in float.
    progress: told in words what slow work goes on (downloads).

    Raises:
        ConfigError: a number is out of its range.
    """

    num_classes: int | None = None
    image_size: int | None = None
    pretrained: bool = True
    drop_path: float = 0.0
    architecture: str | None = None
    seed: int = 0
    quantise: str | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 0:
            raise ConfigError(f"num_classes must be 0 or more, not {self.num_classes}")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size must be at least 1 px, not {self.image_size}")
        if not (math.isfinite(self.drop_path) and 0 <= self.drop_path < 1):
            raise ConfigError(f"drop_path must lie in [0, 1), not {self.drop_path}")

    def recorded(self) -> dict[str, Any]:
        """What a description keeps, as `load_backbone` takes it again."""
        given = [name for name in ("architecture", "quantise") if getattr(self, name) is not None]
        return {name: getattr(self, name) for name in ("image_size", "pretrained", "drop_path", "seed", *given)}


@dataclass(frozen=True)
class Features:
    """How the last feature map of a model is had, for what stands on it in the classifier's place.

    body: the loaded model -> the module without its classifier and pooling; ModelError where it has no feature map.
    last_map: that module, images [batch, 3, H, W] -> [batch, channels, h, w].
    """

    body: Callable[[nn.Module], nn.Module]
    last_map: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A model, in eval mode, and all that is needed to make it again."""

    model: nn.Module
    source: str
    """Where it came from, with its prefix: "timm:vit_small_patch16_224"."""
    head: tuple[str, ...]
    """Names of the modules that classify; empty where the model has none."""
    num_classes: int
    image_size: int
    """Side of the square input, pixels."""
    mean: tuple[float, ...]
    """Per channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    """In evaluation the shorter side becomes image_size / crop_pct before the centre is cropped."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The arguments of `load_backbone` beside source and num_classes, able to go into JSON."""
    features: Features | None = None
    """How its last feature map is had; None where its source cannot say."""

    def describe(self) -> dict[str, Any]:
        """All but the weights, able to go into JSON; `backbone_from_description` reads it."""
        return {
            "source": self.source,
            "arguments": dict(self.arguments),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }


@dataclass(frozen=True)
class Source:
    """Where backbones come from.

    load: a name without its prefix, and options -> the backbone, its `source` with the prefix.
    check: refuses a name that it does not know (ModelError with the nearest) without reading anything; None where
        that cannot be told beforehand.
    """

    load: Callable[[str, LoadOptions], Backbone]
    check: Callable[[str], None] | None = None


def logits(output: Any) -> Tensor:
    """The logits [batch, classes] in what a model returned: a tensor, something with `.logits` (transformers), or a
    tuple whose first item they are.

    Raises:
        ModelError: there are none.
    """
    result = getattr(output, "logits", output)
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise ModelError(
            f"a model must return a tensor of logits or an object with .logits, not {type(output).__name__}"
        )
    return result


def channels_last(model: nn.Module) -> nn.Module:
    """The same model with its convolutions' weights stored channels-last where that pays, about 1.6 x on a CPU.

    It pays where convolutions follow each other; a patch embedding alone is left as it is. Names, shapes and values
    stay; `safetensors.torch.save_file` wants `.contiguous()` of such weights.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return model.to(memory_format=torch.channels_last) if convolutions > 1 else model  # type: ignore[call-overload]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, the caller's own stream untouched outside (CPU, where models are made)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def initialise_head(model: nn.Module, head: tuple[str, ...], seed: int) -> None:
    """Fresh weights for the modules `head`: normal, standard deviation 0.02, cut at two of it; biases zero.

    Norm layers within a head go back to their own initial state. Deterministic by `seed`, whatever the model's size.
    """
    with seeded(seed):
        for module in (m for name in head for m in model.get_submodule(name).modules()):
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(weight, nn.Parameter) and callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def module_names(model: nn.Module, wanted: list[nn.Module]) -> tuple[str, ...]:
    """The qualified names of the modules `wanted`, in the order of the model."""
    ids = {id(module) for module in wanted}
    return tuple(name for name, module in model.named_modules() if name and id(module) in ids)


def segments(source: str, instead: str) -> ModelError:
    """The error of a segmenter's name in a task of classes: what to add, and what to take otherwise."""
    return ModelError(
        f"{source} is a segmenter, and this task is of classes: add task=segmentation, with data of images and their "
        f"masks; {instead}"
    )
