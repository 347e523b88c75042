"""Folders of small task files that name their backbone, and images as bytes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from banks import task
from fewtune.models import Backbone, load_backbone
from fewtune.serving.opening import OpenedBank, open_bank

SOURCE = "timm:test_vit"
CLASSES = {"birds": ("owl", "wren"), "rust": ("none", "some", "much"), "leaves": ("oak", "ash", "elm", "fir", "yew")}


def backbone() -> Backbone:
    return load_backbone(SOURCE, num_classes=4, image_size=32, pretrained=False)


def task_file(path: Path, classes: tuple[str, ...], seed: int = 0) -> Path:
    """A made-up task of `backbone`, saved with what a run notes of itself."""
    own = backbone()
    delta = task(own.model, k=1, seed=seed, classes=len(classes))
    metadata = {"backbone": own.describe(), "class_names": list(classes), "transform": "plain"}
    replace(delta, metadata=metadata).save(path)
    return path


def task_folder(folder: Path) -> Path:
    """A folder with a file for each of `CLASSES`."""
    folder.mkdir(exist_ok=True)
    for seed, (name, classes) in enumerate(CLASSES.items()):
        task_file(folder / f"{name}.safetensors", classes, seed)
    return folder


def opened(folder: Path) -> OpenedBank:
    return open_bank(task_folder(folder))


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def expected(bank: OpenedBank, name: str, content: bytes) -> dict[str, float]:
    """Probabilities by class, from the task alone."""
    image = bank.prepare(name, Image.open(io.BytesIO(content)).convert("RGB"))
    [row] = bank.bank.predict(torch.stack([image]), name, exact=True)
    return dict(row.probabilities)
