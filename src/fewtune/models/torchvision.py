"""Backbones of torchvision."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import torchvision
from torch import nn

from fewtune.errors import ModelError, nearest, one_line
from fewtune.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    LoadOptions,
    Source,
    initialise_head,
    seeded,
)


def check_name(name: str) -> None:
    """ModelError for a name that torchvision does not know."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f'torchvision has no classification model "{name}"{nearest(name, known, count=3)}')


def load_torchvision(name: str, wanted: LoadOptions) -> Backbone:
    """`torchvision.models.get_model(name)` with its default weights; its last Linear (or 1 x 1 convolution) is the
    head, replaced by one for `num_classes` where that is given."""
    check_name(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {}
    if wanted.drop_path > 0:
        options["stochastic_depth_prob"] = wanted.drop_path
    if wanted.image_size is not None and name.startswith("vit_"):
        options["image_size"] = wanted.image_size  # its position grid has a fixed size; all others take any
    with seeded(wanted.seed):
        model = _create(name, weights if wanted.pretrained else None, options)
        head = _last_layer(name, model)
        if wanted.num_classes is not None:
            model.set_submodule(head, _resized(model.get_submodule(head), wanted.num_classes))
    if wanted.num_classes is not None:
        initialise_head(model, (head,), wanted.seed)
    return Backbone(
        model=model.eval(),
        source=f"torchvision:{name}",
        head=(head,),
        num_classes=wanted.num_classes or len(weights.meta["categories"]),
        **_inputs(weights.transforms(), wanted.image_size),
    )


def _create(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    try:
        return torchvision.models.get_model(name, weights=weights, **options)
    except TypeError as error:
        if "stochastic_depth_prob" in str(error):
            raise ModelError(f"torchvision:{name} has no drop path; leave drop_path at 0") from error
        raise ModelError(f"torchvision:{name} cannot be created: {one_line(error, 160)}") from error
    except (URLError, OSError) as error:
        raise ModelError(
            f"the weights of torchvision:{name} could not be fetched ({one_line(error, 160)}); is there a network?"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"torchvision:{name}: {one_line(error, 160)}") from error


def _last_layer(name: str, model: nn.Module) -> str:
    """The name of the layer that classifies: the last Linear, or in SqueezeNet the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        layers = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if layers:
            return layers[-1]
    raise ModelError(f"torchvision:{name} has no layer that could be its head")


def _resized(layer: nn.Module, num_classes: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, num_classes)
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(layer.in_channels, num_classes, kernel_size=layer.kernel_size)  # type: ignore[arg-type]


def _inputs(preset: Any, image_size: int | None) -> dict[str, Any]:
    """The numbers of a weights' transforms."""
    crop = int(getattr(preset, "crop_size", [224])[0])
    resize = int(getattr(preset, "resize_size", [crop])[0])
    return {
        "image_size": image_size or crop,
        "mean": tuple(getattr(preset, "mean", IMAGENET_MEAN)),
        "std": tuple(getattr(preset, "std", IMAGENET_STD)),
        "interpolation": getattr(preset.interpolation, "value", "bilinear"),
        "crop_pct": crop / resize,
    }


TORCHVISION = Source(load_torchvision, check_name)
