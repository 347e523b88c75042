"""What is done to an image and its mask together (torchvision.transforms.v2 on tv_tensors).

Numbers come from `spec`, anything that has `image_size`, `mean`, `std` and `interpolation`: a `Segmenter`, for one.
Images are squeezed to a square without cropping, so that a prediction covers the whole image; their shape is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from fewtune.data.transforms import SquareInput

Kind = Literal["plain", "flip"]
Resized = Callable[[np.ndarray, tuple[int, int]], Tensor]
"""A mask and a size -> the mask at that size."""


class Joint:
    """(PIL RGB image, bool mask [H, W]) -> (image [3, S, S], normalised; mask [1, S, S] of 0 and 1), both float32.

    With `resized=classes_at` masks are numbers of classes, and become [S, S], int64.
    """

    def __init__(self, kind: Kind, spec: SquareInput, resized: Resized | None = None) -> None:
        self.resized = resized or mask_at
        self.size = (spec.image_size, spec.image_size)
        self.resize, self.normalise = _resize(spec), _normalise(spec)
        self.flip = v2.RandomHorizontalFlip() if kind == "flip" else v2.Identity()

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = self.resize(tv_tensors.Image(v2.functional.pil_to_tensor(image)))
        pixels, truth = self.flip(pixels, tv_tensors.Mask(self.resized(mask, self.size)))
        return self.normalise(pixels).as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor)


class Input:
    """PIL RGB image -> (image [3, S, S], normalised; its own height and width, [2]), for prediction."""

    def __init__(self, spec: SquareInput) -> None:
        self.resize, self.normalise = _resize(spec), _normalise(spec)

    def __call__(self, image: Image.Image, mask: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        tensor = self.normalise(self.resize(tv_tensors.Image(v2.functional.pil_to_tensor(image))))
        return tensor.as_subclass(torch.Tensor), torch.tensor([image.height, image.width])


def mask_at(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A bool mask [H, W] at another size, float [1, h, w] of 0 and 1: on where half of a pixel's surroundings is.

    Not the nearest pixel, as v2 takes it for masks: that moves a mask by half a pixel where it is made smaller.
    """
    share = v2.functional.resize(torch.from_numpy(mask)[None].float(), list(size), antialias=True)
    return (share >= 0.5).float()


def classes_at(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A mask of class numbers [H, W] at another size, int64 [h, w]: each pixel's nearest, counted from its centre."""
    numbers = torch.from_numpy(mask.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(numbers, size=size, mode="nearest-exact")[0, 0].long()


def _resize(spec: SquareInput) -> v2.Resize:
    return v2.Resize((spec.image_size, spec.image_size), InterpolationMode(spec.interpolation), antialias=True)


def _normalise(spec: SquareInput) -> v2.Compose:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(spec.mean), list(spec.std))])
