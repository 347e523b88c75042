"""Images as people have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import images
from fewtune.data.images import find_images, open_image, to_rgb, verify_image
from fewtune.errors import DataError


@pytest.mark.parametrize("build", images.COLOURED)
def test_shows_the_picture(build, tmp_path: Path) -> None:
    opened = open_image(build(tmp_path))
    assert opened.mode == "RGB"
    assert opened.size == (32, 16)
    expected = [images.RED, images.GREEN, images.BLUE, images.GREY]
    assert np.allclose(images.corners(opened), expected, atol=6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))  # the left half is opaque black
    image.convert(mode).save(tmp_path / "x.png")
    opened = open_image(tmp_path / "x.png")
    assert (opened.getpixel((1, 2)), opened.getpixel((6, 2))) == ((0, 0, 0), (255, 255, 255))


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 255, 51))).getpixel((0, 0)) == (204, 204, 255)


def test_a_palettes_transparent_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "x.png", transparency=0)
    opened = open_image(tmp_path / "x.png")
    assert (opened.getpixel((1, 1)), opened.getpixel((6, 1))) == ((200, 100, 0), (255, 255, 255))


@pytest.mark.parametrize(
    ("suffix", "dtype", "levels"),
    [(".png", np.uint16, 65536), (".tif", np.uint16, 65536), (".tif", np.float32, 2), (".tif", np.int32, 65536)],
)
def test_deep_grey_is_scaled_by_its_range(suffix: str, dtype: type, levels: int, tmp_path: Path) -> None:
    path = tmp_path / f"deep{suffix}"
    values = np.tile(np.linspace(0, levels - 1, 16), (4, 1)).astype(dtype)
    Image.fromarray(values).save(path)
    opened = np.asarray(open_image(path))
    expected = np.rint(values / (levels - 1) * 255)
    assert np.abs(opened - expected[:, :, None]).max() <= 1
    assert opened.min() == 0
    assert opened.max() == 255


def test_dark_16_bit_image_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 6553, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() == 25  # a tenth of the range, not stretched


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    image.save(tmp_path / "x.png")
    opened = open_image(tmp_path / "x.png")
    assert (opened.getpixel((1, 1)), opened.getpixel((6, 1))) == ((255, 255, 255), (0, 0, 0))


@given(st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=4, max_size=4))
def test_any_float_image_becomes_8_bits_in_order(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32).reshape(2, 2)
    grey = np.asarray(to_rgb(Image.fromarray(array)))[:, :, 0].ravel().astype(int)
    known = np.nan_to_num(array.ravel())
    assert (np.diff(grey[np.argsort(known)]) >= 0).all()


@pytest.mark.parametrize("read", [open_image, verify_image])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_file_is_named(read, suffix: str, tmp_path: Path) -> None:
    path = images.truncated(tmp_path / f"half{suffix}")
    with pytest.raises(DataError, match=f"half{suffix}.*cut short") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(DataError, match=r"text\.jpg.*not an image"):
        open_image(text)
    with pytest.raises(DataError, match=r"absent\.jpg.*does not exist"):
        open_image(tmp_path / "absent.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png"):
        verify_image(tmp_path / "empty.png")


def test_broken_exif_does_not_reject_an_image(tmp_path: Path) -> None:
    images.picture().save(tmp_path / "x.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_image(tmp_path / "x.jpg").size == (32, 16)


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    for name in ("a.png", "b/C.PNG", ".hidden.png", "._a.png", "__MACOSX/a.png", ".git/a.png", "@eaDir/a.png"):
        images.plain(tmp_path / name, images.RED)
    (tmp_path / "notes.txt").write_text("no image")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)) == ["a.png", "b/C.PNG"]
