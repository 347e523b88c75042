"""Backbones of timm."""

from __future__ import annotations

from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from fewtune.errors import ModelError, nearest, one_line
from fewtune.models.backbone import Backbone, Features, LoadOptions, Source, initialise_head, module_names, seeded
from fewtune.models.online import UNREACHED, hub_or_cache, unreached


def load_timm(name: str, wanted: LoadOptions) -> Backbone:
    """`timm.create_model(name)` with its own normalisation; a fresh head where `num_classes` is given."""
    check_name(name)
    num_classes, image_size = wanted.num_classes, wanted.image_size
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with seeded(wanted.seed), hub_or_cache(wanted.pretrained):
        model = _with_drop_path(name, wanted.pretrained, image_size, options, wanted.drop_path)
    config = resolve_model_data_config(model)
    head = timm_head(model)
    if num_classes is not None:
        initialise_head(model, head, wanted.seed)
    return Backbone(
        model=model.eval(),
        source=f"timm:{name}",
        head=head,
        num_classes=int(getattr(model, "num_classes", num_classes or 0)),
        image_size=image_size or int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        features=TIMM_FEATURES,
    )


def check_name(name: str) -> None:
    """ModelError for a name that timm does not know."""
    if not name.startswith(("hf-hub:", "local-dir:")) and not timm.is_model(name):
        raise ModelError(f'timm has no model "{name}"{_near(name)}')


def timm_head(model: nn.Module) -> tuple[str, ...]:
    """The names of what `model.get_classifier()` returns; empty for a model without a head."""
    classifier = model.get_classifier()  # type: ignore[operator]
    several = list(classifier) if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    return module_names(model, [module for module in several if not isinstance(module, nn.Identity)])


def _near(name: str) -> str:
    hint = '; list the names with timm.list_models("*word*")'
    return nearest(name.partition(".")[0], timm.list_models(), count=3, cutoff=0.6, otherwise=hint)


def _with_drop_path(
    name: str, pretrained: bool, image_size: int | None, options: dict[str, Any], drop_path: float
) -> nn.Module:
    """`create` with the drop path that was asked for; said even where it is 0, for some models have another default."""
    try:
        return create(name, pretrained, image_size, {**options, "drop_path_rate": drop_path})
    except _NoSuchOption as error:
        if error.option != "drop_path_rate" or drop_path > 0:
            raise
    return create(name, pretrained, image_size, options)


def create(name: str, pretrained: bool, image_size: int | None, options: dict[str, Any]) -> nn.Module:
    """create_model, with the image size passed to those models that take one."""
    if image_size is None:
        return _tried(name, pretrained, options)
    try:
        model = _tried(name, pretrained, {**options, "img_size": image_size})
    except _NoSuchOption as error:
        if error.option != "img_size":
            raise
    else:
        if getattr(getattr(model, "patch_embed", None), "num_patches", 1) == 0:
            raise ModelError(f"timm:{name} cannot take images of {image_size} px, less than one patch")
        return model
    model = _tried(name, pretrained, options)
    if getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False):
        size = resolve_model_data_config(model)["input_size"][-1]
        raise ModelError(f"timm:{name} takes images of {size} px only, not of {image_size} px")
    return model


class _NoSuchOption(ModelError):
    """The model's class does not take an option."""

    def __init__(self, name: str, option: str) -> None:
        super().__init__(f"timm:{name} does not take the option {option}; leave it out")
        self.option = option


def _tried(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        for option in ("img_size", "drop_path_rate"):
            if f"'{option}'" in str(error):
                raise _NoSuchOption(name, option) from error
        raise ModelError(f"timm:{name} cannot be created: {one_line(error, 160)}") from error
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        if pretrained and "Invalid pretrained tag" in str(error):
            tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")[:5]
            raise ModelError(f'timm has no weights "{name}"; it has {", ".join(tags)}') from error
        if unreached(error):
            raise ModelError(f"the weights of timm:{name} are {UNREACHED}") from error
        if isinstance(error, OSError):
            raise ModelError(
                f"the weights of timm:{name} could not be fetched; is there a network? ({one_line(error, 80)})"
            ) from error
        raise ModelError(f"timm:{name} cannot be created: {one_line(error, 160)}") from error


def timm_body(model: nn.Module) -> nn.Module:
    """The model without its classifier and pooling, whose weights no feature map depends on."""
    if not hasattr(model, "prune_intermediate_layers") or not hasattr(model, "forward_intermediates"):
        raise ModelError(
            f"{type(model).__name__} does not give its feature maps; take a timm backbone that has "
            "forward_intermediates (ViT, Swin, ConvNeXt, …)"
        )
    model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # type: ignore[operator]
    return model


def timm_map(model: nn.Module, images: Tensor) -> Tensor:
    """The last feature map [batch, channels, h, w] of a timm model, after its final normalisation."""
    (features,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)  # type: ignore[operator]
    return features  # type: ignore[no-any-return]


TIMM_FEATURES = Features(timm_body, timm_map)
TIMM = Source(load_timm, check_name)
