"""Backbones of transformers: AutoModelForImageClassification."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewtune.errors import ModelError, one_line
from fewtune.models.backbone import (
    Backbone,
    Features,
    LoadOptions,
    Source,
    initialise_head,
    module_names,
    seeded,
    segments,
)
from fewtune.models.online import UNREACHED, hub_or_cache, unreached

logger = logging.getLogger(__name__)

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, which image processors store."""


def load_hf(name: str, options: LoadOptions) -> Backbone:
    """A model of the hub, or of a local folder, with the normalisation of its image processor.

    Weights must fit: everything but the head comes from the checkpoint, or this raises a ModelError. transformers has
    no classifier without classes, so `num_classes` 0 keeps the model's own, as None does.
    """
    import transformers

    auto, classes = transformers.AutoModelForImageClassification, options.num_classes or None
    with seeded(options.seed), hub_or_cache(not Path(name).exists()):
        config = fetched(name, "its configuration", lambda: transformers.AutoConfig.from_pretrained(name))
        if config.model_type.startswith("sam") and options.num_classes != 0:  # 0 asks for the features alone
            raise segments(f"hf:{name}", "as a classifier take a model that was trained to tell classes apart")
        _set(name, config, classes, options.image_size, options.drop_path)
        if options.pretrained:
            asked = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, report = fetched(name, "its weights", lambda: auto.from_pretrained(name, **asked))
        else:
            model, report = fetched(name, "its class", lambda: auto.from_config(config)), {}
        inputs = _inputs(name, config, options.image_size)
    head = _head(name, model)
    check_report(name, report, head, options.image_size)
    if classes is not None:
        initialise_head(model, head, options.seed)
    return Backbone(
        model=model.eval(),
        source=f"hf:{name}",
        head=head,
        num_classes=int(config.num_labels),
        features=HF_FEATURES,
        **inputs,
    )


def fetched(name: str, what: str, load: Any) -> Any:
    """`load()`, its many errors turned into one line."""
    try:
        with hub_or_cache(not Path(name).exists()):
            return load()
    except OSError as error:
        if unreached(error):
            raise ModelError(f"hf:{name}: {what} could not be loaded: {UNREACHED}") from error
        hint = "does the folder hold a model?" if Path(name).exists() else "is the name right, is there a network?"
        raise ModelError(f"hf:{name}: {what} could not be loaded; {hint} ({one_line(error, 100)})") from error
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"hf:{name}: {what} could not be loaded: {one_line(error, 160)}") from error


def _set(name: str, config: Any, num_classes: int | None, image_size: int | None, drop_path: float) -> None:
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    if image_size is not None and hasattr(config, "image_size"):
        config.image_size = image_size
    if drop_path > 0:
        if not hasattr(config, "drop_path_rate"):
            raise ModelError(f"hf:{name} has no drop path; leave drop_path at 0")
        config.drop_path_rate = drop_path


def _head(name: str, model: Any) -> tuple[str, ...]:
    """The children beside the base model that end in one output per class."""
    layers = []
    for child in model.children():
        linear = [m for m in child.modules() if isinstance(m, nn.Linear)]
        if child is not model.base_model and linear and linear[-1].out_features == model.config.num_labels:
            layers.append(child)
    if not layers:
        raise ModelError(f"hf:{name}: no classifying layer was found in {type(model).__name__}")
    return module_names(model, layers)


def check_report(name: str, report: dict[str, Any], head: tuple[str, ...], image_size: int | None) -> None:
    """All but the head must have come from the checkpoint: transformers fills gaps with random weights."""
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report.get("mismatched_keys", ())]
    wrong = [
        key
        for key in sorted([*mismatched, *report.get("missing_keys", ())])
        if not any(key.startswith(f"{part}.") for part in head)
    ]
    if wrong:
        size = f" at {image_size} px (leave the image size out)" if image_size else ""
        raise ModelError(f"hf:{name}: the checkpoint does not give {', '.join(wrong[:3])}{size}")


def _inputs(name: str, config: Any, image_size: int | None) -> dict[str, Any]:
    """Size and normalisation from the image processor; half and half where the model came without one."""
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        logger.warning("hf:%s has no image processor: mean and std are taken as 0.5", name)
        processor = None
    size = _side(getattr(processor, "size", None))
    crop = _side(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else None
    side = crop or size or getattr(config, "image_size", None) or 224
    side = side[0] if isinstance(side, list | tuple) else side
    return {
        "image_size": image_size or int(side),
        "mean": tuple(getattr(processor, "image_mean", None) or (0.5, 0.5, 0.5)),
        "std": tuple(getattr(processor, "image_std", None) or (0.5, 0.5, 0.5)),
        "interpolation": INTERPOLATIONS[int(getattr(processor, "resample", None) or 3)],
        "crop_pct": crop / size if crop and size else 1.0,
    }


def _side(size: Any) -> int | None:
    """One number from a processor's size: {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if size is None:
        return None
    for key in ("shortest_edge", "height"):
        value = size.get(key) if isinstance(size, dict) else getattr(size, key, None)
        if value:
            return int(value)
    return None


def hf_body(model: nn.Module) -> nn.Module:
    """The model without its classifier."""
    return model.base_model  # type: ignore[return-value]


def hf_map(model: Any, images: Tensor) -> Tensor:
    """The last hidden state of a transformers model as a map [batch, channels, h, w]; class and register tokens, which
    stand before the patches, are left out."""
    hidden: Tensor = model(images).last_hidden_state
    if hidden.ndim == 4:  # convolutional: a map already
        return hidden
    patch = getattr(model.config, "patch_size", None)
    side = images.shape[-1] // patch if isinstance(patch, int) else 0
    if side == 0 or side * side > hidden.shape[1]:  # merged patches: no token but theirs
        side = math.isqrt(hidden.shape[1])
    return hidden[:, hidden.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))


HF_FEATURES = Features(hf_body, hf_map)
HF = Source(load_hf)
