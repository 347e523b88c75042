"""What is done to an image before a model sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import images
from fewtune.data import Split, eval_transform, train_transform, two_views
from fewtune.errors import ConfigError

SPEC = SimpleNamespace(image_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), interpolation="bicubic", crop_pct=0.5)


def test_plain_squeezes_the_whole_image() -> None:
    tensor = train_transform("plain", SPEC)(images.picture(64, 32))
    assert tensor.shape == (3, 8, 8)
    assert tensor.dtype == torch.float32
    unit = tensor * torch.tensor(SPEC.std)[:, None, None] + torch.tensor(SPEC.mean)[:, None, None]
    quarters = [unit[:, 1, 1], unit[:, 1, 6], unit[:, 6, 1], unit[:, 6, 6]]
    expected = torch.tensor([images.RED, images.GREEN, images.BLUE, images.GREY]) / 255
    torch.testing.assert_close(torch.stack(quarters), expected, atol=0.02, rtol=0)


def test_plain_has_no_augmentation() -> None:
    transform = train_transform("plain", SPEC)
    image = images.picture()
    assert torch.equal(transform(image), transform(image))
    assert torch.equal(transform(image), eval_transform("plain", SPEC)(image))


@pytest.mark.parametrize("kind", ["none", "fgvc"])
def test_evaluation_crops_the_centre_by_the_models_share(kind: str) -> None:
    # Shorter side 16 -> 8 / 0.5 = 16: nothing is resized, and the centre 8 x 8 of a 32 x 16 picture is kept.
    picture = Image.new("RGB", (32, 16), images.BLUE)
    picture.paste(images.RED, (12, 4, 20, 12))
    tensor = eval_transform(kind, SPEC)(picture)  # type: ignore[arg-type]
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
    torch.testing.assert_close(tensor, red[:, None, None].expand(3, 8, 8), atol=0.02, rtol=0)


@pytest.mark.parametrize(("crop", "resize"), [(224, 232), (224, 256), (299, 342), (384, 384), (260, 288)])
def test_evaluation_resizes_to_the_size_that_the_share_came_from(crop: int, resize: int) -> None:
    spec = SimpleNamespace(**{**vars(SPEC), "image_size": crop, "crop_pct": crop / resize})
    assert eval_transform("none", spec).transforms[0].size == [resize]  # type: ignore[attr-defined]


def test_fgvc_crops_at_random_and_flips() -> None:
    torch.manual_seed(0)
    transform = train_transform("fgvc", SPEC)
    drawn = [transform(images.picture()) for _ in range(20)]
    assert all(t.shape == (3, 8, 8) for t in drawn)
    assert len({tuple(t.flatten().tolist()) for t in drawn}) > 10
    whole = Image.new("RGB", (8, 8), images.RED)
    whole.paste(images.BLUE, (0, 0, 4, 8))
    reds = {bool(t[0, 4, 0] > t[0, 4, 7]) for t in (transform(whole) for _ in range(40))}
    assert reds == {True, False}  # flipped, and not


def test_two_views_differ_and_follow_the_seed() -> None:
    views = two_views(SPEC)
    torch.manual_seed(1)
    first = [views(images.picture()) for _ in range(8)]
    torch.manual_seed(1)
    again = [views(images.picture()) for _ in range(8)]
    assert all(
        torch.equal(a, b) for pair, twin in zip(first, again, strict=True) for a, b in zip(pair, twin, strict=True)
    )
    assert any(not torch.equal(a, b) for a, b in first)


def test_two_views_jitter_four_times_of_five_and_grey_once_of_five() -> None:
    torch.manual_seed(0)
    views = two_views(SPEC)
    mean, std = (torch.tensor(x)[:, None, None] for x in (SPEC.mean, SPEC.std))
    colours = [
        (view * std + mean)[:, 4, 4] for _ in range(400) for view in views(Image.new("RGB", (16, 16), (200, 90, 40)))
    ]
    grey = sum(bool((c - c.mean()).abs().max() < 0.01) for c in colours) / len(colours)
    kept = sum(bool((c * 255 - torch.tensor([200.0, 90, 40])).abs().max() < 1) for c in colours) / len(colours)
    assert grey == pytest.approx(0.2, abs=0.06)
    assert kept == pytest.approx(0.2 * 0.8, abs=0.05)


def test_two_views_through_a_loader() -> None:
    split = Split([images.picture()] * 4, [0, 1, 0, 1], list("abcd"), read=lambda image: image)
    loader = torch.utils.data.DataLoader(split.with_transform(two_views(SPEC)), batch_size=4)
    (first, second), labels = next(iter(loader))
    assert first.shape == second.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 0, 1]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match='"randaug"'):
        train_transform("randaug", SPEC)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bicubic"):
        eval_transform("plain", SimpleNamespace(**{**vars(SPEC), "interpolation": "cubic"}))
