"""What is done to an image before a model sees it (torchvision.transforms.v2).

Every function takes the numbers from `spec`, which is anything that has `image_size`, `mean`, `std`, `interpolation`
and `crop_pct`: a `fewtune.models.Backbone`, for one. A transform takes a PIL RGB image and returns a float tensor
[3, image_size, image_size], normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fewtune.errors import ConfigError

Kind = Literal["plain", "flip", "fgvc", "rand", "none"]
Transform = Callable[[Any], Tensor]


class SquareInput(Protocol):
    """The square images that a model takes: side in pixels, normalisation, and how they are resized."""

    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def interpolation(self) -> str: ...


class InputSpec(SquareInput, Protocol):
    """The same, and the share of the side that is kept when an image is evaluated."""

    @property
    def crop_pct(self) -> float: ...


def train_transform(kind: Kind, spec: InputSpec) -> Transform:
    """The training transform.

    - "plain": resized to a square without cropping, no augmentation (the manner of VTAB-1k);
    - "flip": the same, and flipped horizontally half of the time;
    - "fgvc": random resized crop and horizontal flip (fine-grained photographs);
    - "rand": the same, and two operations of RandAugment at magnitude 9 (Cubuk et al. 2020);
    - "none": no augmentation, cropped as in evaluation.
    """
    if kind == "rand":
        crop, mix = _random_crop_and_flip(spec), v2.RandAugment(interpolation=_interpolation(spec))
        return v2.Compose([*crop, mix, *_normalised(spec)])
    if kind == "fgvc":
        return v2.Compose([*_random_crop_and_flip(spec), *_normalised(spec)])
    if kind == "flip":
        return v2.Compose([v2.RandomHorizontalFlip(), eval_transform("plain", spec)])
    return eval_transform(kind, spec)


def eval_transform(kind: Kind, spec: InputSpec) -> Transform:
    """The transform for validation, test and prediction of a model trained with `train_transform(kind, …)`.

    "plain" and "flip" resize to a square; the others resize the shorter side to image_size / crop_pct and crop the
    centre.
    """
    size, how = spec.image_size, _interpolation(spec)
    if kind in ("plain", "flip"):
        return v2.Compose([v2.Resize((size, size), interpolation=how), *_normalised(spec)])
    if kind not in ("fgvc", "rand", "none"):
        raise ConfigError(f'no transform is called "{kind}": take "plain", "flip", "fgvc", "rand" or "none"')
    shorter = int(size / spec.crop_pct + 1e-6)  # crop_pct may itself be a quotient: 224 / (224 / 232) is 232
    resize = v2.Resize(shorter, interpolation=how)
    return v2.Compose([resize, v2.CenterCrop(size), *_normalised(spec)])


def two_views(spec: InputSpec) -> TwoViews:
    """Two augmented views of an image for the supervised contrastive loss: random resized crop, horizontal flip,
    colour jitter (0.4, 0.4, 0.4, 0.1) with p = 0.8, greyscale with p = 0.2 (Khosla et al. 2020).

    The transform returns (view1, view2), so a loader over it yields ((views1, views2), labels).
    """
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    view = v2.Compose([*_random_crop_and_flip(spec), jitter, v2.RandomGrayscale(p=0.2), *_normalised(spec)])
    return TwoViews(view)


class TwoViews:
    """Applies a random transform twice: image -> (view1, view2)."""

    def __init__(self, view: Transform) -> None:
        self.view = view

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.view(image), self.view(image)


def _random_crop_and_flip(spec: InputSpec) -> list[v2.Transform]:
    crop = v2.RandomResizedCrop(spec.image_size, interpolation=_interpolation(spec))
    return [crop, v2.RandomHorizontalFlip()]


def _normalised(spec: InputSpec) -> list[Normalised]:
    return [Normalised(spec.mean, spec.std)]


class Normalised:
    """PIL RGB image -> float tensor [3, H, W], (pixels / 255 - mean) / std in one go.

    The same as v2.ToImage, ToDtype(scale=True) and Normalize but for the last bits, in half their time.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = 255 * torch.tensor(mean)[:, None, None]
        self.scale = 1 / (255 * torch.tensor(std))[:, None, None]

    def __repr__(self) -> str:
        return f"Normalised(mean={self.mean.flatten().tolist()}, scale={self.scale.flatten().tolist()})"

    def __call__(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).mul_(self.scale)


def _interpolation(spec: InputSpec) -> InterpolationMode:
    try:
        return InterpolationMode(spec.interpolation)
    except ValueError:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise ConfigError(f'no interpolation is called "{spec.interpolation}": take one of {known}') from None
