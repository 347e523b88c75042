"""The source `file:`: a local checkpoint, with an architecture of any other source."""

from __future__ import annotations

from dataclasses import replace

from fewtune.errors import ModelError
from fewtune.models.backbone import Backbone, LoadOptions, Source
from fewtune.models.checkpoint import load_checkpoint
from fewtune.models.sources import load


def load_file(path: str, options: LoadOptions) -> Backbone:
    """The backbone whose weights the file at `path` holds, by the name of its architecture."""
    architecture = options.architecture
    if architecture is None:
        raise ModelError(f"file:{path}: say which model the file holds: architecture=timm:NAME, for instance")
    random = replace(options, architecture=None, pretrained=False)
    backbone = load_checkpoint(path, lambda n: load(architecture, replace(random, num_classes=n)), options.num_classes)
    return replace(backbone, source=f"file:{path}")


FILE = Source(load_file)
