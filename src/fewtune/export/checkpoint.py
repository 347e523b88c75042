"""A folder with model.safetensors and config.json, as timm and transformers themselves write them.

The config names the architecture with its arguments, so the weights cannot be loaded into another one by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewtune.errors import ExportError, one_line
from fewtune.export.tuned import Logits, Run, Tuned
from fewtune.files import save_state, write_json

Lines = tuple[str, str, str]
"""Python that loads what was written."""


@dataclass(frozen=True)
class Library:
    """How a library keeps its models.

    write: put the model and its config into an empty folder.
    load: the same folder -> the model, by the library's own means.
    lines: the Python that loads it from where it lies in the end.
    """

    write: Callable[[Tuned, Path], None]
    load: Callable[[Tuned, Path], nn.Module]
    lines: Callable[[Tuned, Path], Lines]


def library_of(tuned: Tuned) -> Library:
    """The library that the task's backbone is of."""
    backbone = tuned.task.backbone
    kind, colon, _ = str(backbone.arguments.get("architecture") or backbone.source).partition(":")
    return LIBRARIES.get(kind if colon else "timm", TIMM)


def write_checkpoint(tuned: Tuned, folder: Path) -> Run:
    """Write the tuned model into `folder`, and load it again as any reader does.

    Raises:
        TuningError: the method's modules cannot be merged into the weights.
        ExportError: the library does not load it.
    """
    if not tuned.merged:
        tuned.task.plain_state_dict()  # says why
    library = library_of(tuned)
    tuned.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # files hold no other
    library.write(tuned, folder)
    try:
        return Logits(library.load(tuned, folder).eval())
    except RuntimeError as error:
        raise ExportError(f"the exported model cannot be loaded again: {one_line(error)}") from error


def _write_timm(tuned: Tuned, folder: Path) -> None:
    from timm.models import save_for_hf

    given = tuned.inputs()
    data = {
        "input_size": (3, tuned.image_size, tuned.image_size),
        "crop_pct": given["crop_pct"],
        "crop_mode": "squash" if tuned.square else "center",
        **{name: given[name] for name in ("interpolation", "mean", "std")},
    }
    labels = {"label_names": given["class_names"]}
    save_for_hf(tuned.model, str(folder), model_config=labels, data_config=data, safe_serialization=True)


def _load_timm(_: Tuned, folder: Path) -> nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def _timm_lines(_: Tuned, folder: Path) -> Lines:
    return (
        "import timm",
        f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    )


def _write_transformers(tuned: Tuned, folder: Path) -> None:
    from transformers import BitImageProcessor
    from transformers.image_utils import PILImageResampling

    model: Any = tuned.model
    names, side = tuned.class_names, tuned.image_size
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(folder)
    given = tuned.inputs()
    square = {"height": side, "width": side}
    BitImageProcessor(
        size=square if tuned.square else {"shortest_edge": int(side / given["crop_pct"] + 1e-6)},
        do_center_crop=not tuned.square,
        crop_size=square,
        resample=getattr(PILImageResampling, given["interpolation"].upper()),
        image_mean=given["mean"],
        image_std=given["std"],
    ).save_pretrained(folder)


def _load_transformers(tuned: Tuned, folder: Path) -> nn.Module:
    family: Any = type(tuned.model)
    return family.from_pretrained(folder)


def _transformers_lines(tuned: Tuned, folder: Path) -> Lines:
    family = type(tuned.model).__name__
    return (
        f"from transformers import AutoImageProcessor, {family}",
        f'model = {family}.from_pretrained("{folder}").eval()',
        f'processor = AutoImageProcessor.from_pretrained("{folder}")',
    )


def _write_torchvision(tuned: Tuned, folder: Path) -> None:
    """torchvision has no form of its own: the weights, and a config of the same words as timm's."""
    name, options = _torchvision_call(tuned)
    save_state(tuned.model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {"architecture": f"torchvision:{name}", "model_args": options, **tuned.inputs()})


def _torchvision_call(tuned: Tuned) -> tuple[str, dict[str, int]]:
    backbone = tuned.task.backbone
    name = str(backbone.arguments.get("architecture") or backbone.source).partition(":")[2]
    size = {"image_size": tuned.image_size} if name.startswith("vit_") else {}
    return name, {"num_classes": len(tuned.class_names), **size}


def _load_torchvision(tuned: Tuned, folder: Path) -> nn.Module:
    import safetensors.torch
    import torchvision

    name, options = _torchvision_call(tuned)
    model = torchvision.models.get_model(name, **options)
    safetensors.torch.load_model(model, folder / "model.safetensors")
    return model


def _torchvision_lines(tuned: Tuned, folder: Path) -> Lines:
    name, options = _torchvision_call(tuned)
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return (
        "import safetensors.torch, torchvision",
        f'model = torchvision.models.get_model("{name}", {given}).eval()',
        f'safetensors.torch.load_model(model, "{folder}/model.safetensors")',
    )


TIMM = Library(_write_timm, _load_timm, _timm_lines)
LIBRARIES = {
    "timm": TIMM,
    "demo": TIMM,
    "hf": Library(_write_transformers, _load_transformers, _transformers_lines),
    "torchvision": Library(_write_torchvision, _load_torchvision, _torchvision_lines),
}
