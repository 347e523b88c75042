"""Decoding of uploaded images, within limits."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from fewtune.data.images import read_image
from fewtune.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded; Pillow knows formats that start other programs."""


def decode(content: bytes, max_pixels: int) -> Image.Image:
    """An 8-bit RGB image, upright.

    Raises:
        DataError: it is no image, damaged, or of more pixels than allowed, told before any is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what strangers send
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
        except UnidentifiedImageError:
            raise DataError(f"the body is not an image in a format that is read here: {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise DataError(f"the image has more than the {max_pixels:,} pixels that are allowed") from None
        except Exception as error:
            raise DataError(f"the image is damaged ({type(error).__name__})") from None
        if width * height > max_pixels:
            raise DataError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are allowed")
        try:
            return read_image(io.BytesIO(content), "in the request")
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise what they like
            raise DataError(f"the image is damaged ({type(error).__name__})") from None
