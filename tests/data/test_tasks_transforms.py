"""The field's augmentation, on fixed images, against torchvision's and timm's own code."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms import v2

from fewtune.data import eval_transform, train_transform, two_views

SPEC = SimpleNamespace(
    image_size=24, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", crop_pct=0.9
)
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def photo(width: int, height: int) -> Image.Image:
    """Smooth noise, always the same."""
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)


PHOTOS = [photo(64, 48), photo(31, 77), photo(24, 24), photo(200, 33)]


@pytest.mark.parametrize("image", PHOTOS, ids=lambda image: "x".join(map(str, image.size)))
def test_plain_is_timms_squash(image: Image.Image) -> None:
    """VTAB: resized to the square without cropping."""
    theirs = timm.data.create_transform(
        24, is_training=False, interpolation="bicubic", mean=SPEC.mean, std=SPEC.std, crop_pct=1.0, crop_mode="squash"
    )
    torch.testing.assert_close(train_transform("plain", SPEC)(image), theirs(image), **TOLERANCE)


@pytest.mark.parametrize("image", PHOTOS[:2], ids=lambda image: "x".join(map(str, image.size)))
def test_evaluation_is_timms(image: Image.Image) -> None:
    theirs = timm.data.create_transform(
        24, is_training=False, interpolation="bicubic", mean=SPEC.mean, std=SPEC.std, crop_pct=0.9
    )
    torch.testing.assert_close(eval_transform("fgvc", SPEC)(image), theirs(image), **TOLERANCE)


@pytest.mark.parametrize("image", PHOTOS, ids=lambda image: "x".join(map(str, image.size)))
def test_fgvc_is_torchvisions_random_resized_crop_and_flip(image: Image.Image) -> None:
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(24, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    for seed in range(8):
        torch.manual_seed(seed)
        own = train_transform("fgvc", SPEC)(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(own, torch.as_tensor(theirs(image)), **TOLERANCE)


def test_fgvc_draws_crops_as_timm_does() -> None:
    """timm draws from another generator; areas and shapes of the crops have the same ranges and near means."""
    own = train_transform("fgvc", SPEC).transforms[0]  # type: ignore[attr-defined]
    theirs = timm.data.create_transform(24, is_training=True).transforms[0]
    assert own.scale == tuple(theirs.scale) == (0.08, 1.0)
    assert own.ratio == pytest.approx(tuple(theirs.ratio))
    torch.manual_seed(0)
    random.seed(0)
    image = photo(200, 150)
    areas = [(crop["height"], crop["width"]) for crop in (own.make_params([image]) for _ in range(10_000))]
    drawn = [theirs.get_params(image, theirs.scale, theirs.ratio)[2:] for _ in range(10_000)]
    means = [np.mean([h * w for h, w in sizes]) for sizes in (areas, drawn)]
    assert means[0] == pytest.approx(means[1], rel=0.03)


def test_two_views_are_those_of_supervised_contrastive_learning() -> None:
    """Khosla et al. 2020: crop, flip, jitter (0.4, 0.4, 0.4, 0.1) with p = 0.8, grey with p = 0.2."""
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(24, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    for seed in range(12):
        torch.manual_seed(seed)
        first, second = two_views(SPEC)(PHOTOS[0])
        torch.manual_seed(seed)
        for view in (first, second):
            torch.testing.assert_close(view, torch.as_tensor(theirs(PHOTOS[0])), **TOLERANCE)
        assert not torch.equal(first, second)
