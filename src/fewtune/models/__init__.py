"""Backbones by name: timm, transformers, torchvision, a local checkpoint, a demo model fetched through pip."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewtune.errors import ConfigError, MissingExtra, ModelError
from fewtune.models.backbone import Backbone, channels_last, logits

__all__ = ["Backbone", "backbone_from_description", "channels_last", "check_name", "load_backbone", "logits"]

PREFIXES = ("timm", "hf", "torchvision", "file", "demo")


def load_backbone(
    source: str,
    *,
    num_classes: int | None,
    image_size: int | None = None,
    pretrained: bool = True,
    drop_path: float = 0.0,
    architecture: str | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Backbone:
    """A backbone by name.

    Args:
        source: "timm:NAME" (or just NAME), "hf:ID" or "hf:FOLDER", "torchvision:NAME", "file:PATH" (a checkpoint,
            with `architecture`), "demo:vit-small", "demo:efficientnet-lite0".
        num_classes: size of the fresh head; None keeps the model's own head.
        image_size: side of the input in pixels; None means the model's own.
        pretrained: False leaves the weights random (deterministic by `seed`), the same on every call.
        drop_path: rate of stochastic depth, for the models that have it.
        architecture: for "file:" the model whose weights the file holds, "timm:NAME" for instance.
        seed: of the fresh head; the caller's random state is not touched.
        progress: told in words what slow work goes on (downloads).

    Raises:
        ModelError: the name is unknown (the nearest are named), or the weights cannot be had or do not fit.
    """
    kind, name = _parsed(source)
    _check_numbers(num_classes, image_size, drop_path)
    options: dict[str, Any] = {"image_size": image_size, "pretrained": pretrained, "drop_path": drop_path}
    if kind == "file":
        if architecture is None:
            raise ModelError(f"{source}: say which model the file holds: architecture=timm:NAME, for instance")
        from fewtune.models.checkpoint import load_checkpoint

        random = {**options, "pretrained": False, "seed": seed}
        backbone = load_checkpoint(name, lambda n: load_backbone(architecture, num_classes=n, **random), num_classes)
        backbone = replace(backbone, source=f"file:{name}")
    else:
        backbone = _loader(kind, progress)(name, num_classes=num_classes, seed=seed, **options)
    kept = {**options, "seed": seed} | ({"architecture": architecture} if architecture else {})
    return replace(backbone, arguments=kept)


def backbone_from_description(
    description: dict[str, Any], num_classes: int | None, progress: Callable[[str], None] | None = None
) -> Backbone:
    """The backbone that `Backbone.describe` described, with a head for `num_classes` and the described inputs."""
    try:
        source, arguments = description["source"], description["arguments"]
        inputs = {
            "image_size": int(description["image_size"]),
            "mean": tuple(description["mean"]),
            "std": tuple(description["std"]),
            "interpolation": description["interpolation"],
            "crop_pct": float(description["crop_pct"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the description of the backbone is not complete: {error!r}") from error
    return replace(load_backbone(source, num_classes=num_classes, progress=progress, **arguments), **inputs)


def check_name(source: str) -> None:
    """Refuse, before anything is read, a name that no library knows. What lies on a hub or in a file is not looked at.

    Raises:
        ModelError: the name is unknown; the nearest are named.
    """
    kind, name = _parsed(source)
    match kind:
        case "timm":
            from fewtune.models.timm import check_name as check
        case "torchvision":
            from fewtune.models.torchvision import check_name as check
        case "demo":
            from fewtune.models.demo import check_name as check
        case _:
            return
    check(name)


def _parsed(source: str) -> tuple[str, str]:
    kind, colon, name = source.partition(":")
    if not colon or kind == "hf-hub":
        return "timm", source
    if kind not in PREFIXES:
        raise ModelError(f'"{source}": a model is named PREFIX:NAME, with one of {", ".join(PREFIXES)} for PREFIX')
    if not name:
        raise ModelError(f'"{source}": a name is missing after "{kind}:"')
    return kind, name


def _check_numbers(num_classes: int | None, image_size: int | None, drop_path: float) -> None:
    if num_classes is not None and num_classes < 0:
        raise ConfigError(f"num_classes must be 0 or more, not {num_classes}")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size must be at least 1 px, not {image_size}")
    if not (math.isfinite(drop_path) and 0 <= drop_path < 1):
        raise ConfigError(f"drop_path must lie in [0, 1), not {drop_path}")


def _loader(kind: str, progress: Callable[[str], None] | None) -> Callable[..., Backbone]:
    """The function that loads models of this kind; its library is imported only now."""
    for library, extra in (("timm", "train"), ("torchvision", "train")):
        if kind != "hf" and importlib.util.find_spec(library) is None:
            raise MissingExtra(library, extra)
    match kind:
        case "timm":
            from fewtune.models.timm import load_timm

            return load_timm
        case "torchvision":
            from fewtune.models.torchvision import load_torchvision

            return load_torchvision
        case "hf":
            from fewtune.models.hf import load_hf

            return load_hf
        case _:
            from fewtune.models.demo import load_demo

            return functools.partial(load_demo, progress=progress)
