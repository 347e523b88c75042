"""Where backbones come from, by the prefix of a model's name: `SOURCES` maps it to a `Source`.

An installed package adds its own by an entry point of the group ``fewtune.sources``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fewtune.errors import ModelError
from fewtune.models.backbone import Backbone, LoadOptions, Source, segments
from fewtune.plugins import Deferred, Table
from fewtune.quantised import quantise

if TYPE_CHECKING:  # what the table names, so that the import contracts see it
    from fewtune.models import demo, file, hf, timm, torchvision  # noqa: F401


SOURCES: Table[Source] = Table(
    "fewtune.sources",
    "source of models",
    deferred={
        "timm": Deferred("fewtune.models.timm:TIMM", ("timm",)),
        "hf": Deferred("fewtune.models.hf:HF", ("transformers",), "hf"),
        "torchvision": Deferred("fewtune.models.torchvision:TORCHVISION", ("torchvision",)),
        "file": Deferred("fewtune.models.file:FILE"),
        "demo": Deferred("fewtune.models.demo:DEMO", ("timm",)),
    },
)
"""Source by the prefix of a model's name; what stands without a prefix is timm's."""


def load(source: str, options: LoadOptions) -> Backbone:
    """The backbone of a name, with the options that made it."""
    prefix, name = split_name(source)
    backbone = SOURCES[prefix].load(name, options)
    if options.quantise is not None:
        quantise(backbone.model, options.quantise, backbone.head)
    return replace(backbone, arguments=options.recorded())


def check_name(source: str) -> None:
    """Refuse, before anything is read, a name that no library knows. What lies on a hub or in a file is not looked at.

    Raises:
        ModelError: the name is unknown; the nearest are named.
    """
    prefix, name = split_name(source)
    if (check := SOURCES[prefix].check) is not None:
        check(name)


def split_name(source: str) -> tuple[str, str]:
    """The prefix, a key of `SOURCES`, and the name after it.

    Raises:
        ModelError: there is no such source, or no name.
    """
    prefix, colon, name = source.partition(":")
    if not colon or prefix == "hf-hub":  # timm's own way to name a model of the hub
        return "timm", source
    if prefix == "sam":
        raise segments(source, "model=hf:facebook/sam-vit-base, or model=file:CHECKPOINT with arch=" + source)
    if prefix not in SOURCES:
        raise ModelError(f'"{source}": a model is named PREFIX:NAME, with one of {", ".join(SOURCES)} for PREFIX')
    if not name:
        raise ModelError(f'"{source}": a name is missing after "{prefix}:"')
    return prefix, name
