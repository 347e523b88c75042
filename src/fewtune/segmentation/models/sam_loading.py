"""Segment Anything by name: from the hub, a local folder, or a checkpoint file in either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, SamConfig, SamModel

from fewtune.errors import ModelError, nearest
from fewtune.models.backbone import IMAGENET_MEAN, IMAGENET_STD, seeded
from fewtune.models.checkpoint import load_weights, read_state
from fewtune.models.hf import check_report, fetched
from fewtune.segmentation.models.sam import SamSegmenter, resize
from fewtune.segmentation.models.sam_layout import converted
from fewtune.segmentation.models.segmenter import Segmenter

HEAD = ("sam.mask_decoder",)

ARCHITECTURES = {
    "vit-b": (768, 12, 12, (2, 5, 8, 11)),
    "vit-l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit-h": (1280, 32, 16, (7, 15, 23, 31)),
}
"""Width, blocks, heads and the blocks that attend to the whole image of the published image encoders; all else is the
same in the three."""


def load_sam(source: str, config: Any, *, image_size: int | None, pretrained: bool, seed: int) -> Segmenter:
    """A SamModel of the hub or of a local folder ("hf:NAME"), or one with random weights, by its SamConfig."""
    if pretrained:
        name = source.partition(":")[2]
        load: dict[str, Any] = {"config": config, "output_loading_info": True}
        sam, report = fetched(name, "its weights", lambda: SamModel.from_pretrained(name, **load))
        check_report(name, report, (), None)
    else:
        sam = random_sam(config, seed)
    return _segmenter(sam, source, image_size)


def load_sam_file(path: str, config: Any, *, image_size: int | None) -> Segmenter:
    """The checkpoint file at `path`, in the original layout or transformers', read with weights_only=True, strictly.

    Args:
        path: a .pth or .safetensors file.
        config: the SamConfig of the model that it holds; its image size is taken from the file.
        image_size: side of the input; None means the file's own.

    Raises:
        ModelError: the file is missing or damaged, or does not fit the configuration.
    """
    state = converted(read_state(Path(path)))
    positions = state.get("vision_encoder.pos_embed")
    if positions is not None and positions.ndim == 4:
        _set_size(config, int(positions.shape[1]) * int(config.vision_config.patch_size))
    with torch.device("meta"):  # no random weights: every one comes from the file
        sam = SamModel(config)
    sam.to_empty(device="cpu")
    load_weights(sam, state, (), f"file:{path}")
    return _segmenter(sam, f"file:{path}", image_size)


def sam_config(architecture: str) -> SamConfig | None:
    """The configuration of "sam:vit-b" and its like, or of "hf:NAME"; None where NAME is another kind of model."""
    kind, _, name = architecture.partition(":")
    if kind == "hf":
        config = fetched(name, "its configuration", lambda: AutoConfig.from_pretrained(name))
        return config if isinstance(config, SamConfig) else None
    if name not in ARCHITECTURES:
        known = ", ".join(f"sam:{size}" for size in ARCHITECTURES)
        hint = nearest(name, ARCHITECTURES, cutoff=0.0, prefix="sam:")
        raise ModelError(f'no architecture is called "{architecture}"{hint}; there is {known}')
    width, depth, heads, whole = ARCHITECTURES[name]
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return SamConfig(vision_config={**vision, "global_attn_indexes": list(whole)})


def random_sam(config: Any, seed: int) -> SamModel:
    """A SamModel with random weights, deterministic by `seed`; the configuration's own spread of 1e-10 for the image
    encoder, meant to be overwritten at once, would leave it dead."""
    config.vision_config.initializer_range = config.initializer_range
    with seeded(seed):
        return SamModel(config)


def _set_size(config: Any, image_size: int) -> None:
    prompt = config.prompt_encoder_config
    config.vision_config.image_size = prompt.image_size = image_size
    prompt.image_embedding_size = image_size // prompt.patch_size


def _segmenter(sam: Any, source: str, image_size: int | None) -> Segmenter:
    if image_size is not None and image_size != sam.config.vision_config.image_size:
        resize(sam, image_size)
    return Segmenter(
        model=SamSegmenter(sam).eval(),
        source=source,
        head=HEAD,
        image_size=int(sam.config.vision_config.image_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bilinear",
    )
