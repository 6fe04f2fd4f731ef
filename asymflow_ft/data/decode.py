"""From an encoded image of any kind to 8-bit RGB, as a viewer would show it."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class UnreadableImage(ValueError):
    """An image that is gone or cannot be decoded; callers count these and go on."""


def decode(content: bytes, name: str) -> Image.Image:
    """The picture in RGB: first frame, EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Args:
        name: what to call the image in a message.

    Raises:
        UnreadableImage: no image, cut short, too large (PIL's limit), or grey values outside their known range.
    """
    try:
        with Image.open(io.BytesIO(content)) as stored:
            stored.load()
            picture = ImageOps.exif_transpose(stored)
        if picture.mode.startswith("I") or picture.mode == "F":
            picture = _deep_grey(picture)
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: not an image that PIL can read ({len(content)} bytes)") from error
    except Exception as error:  # a broken file can make PIL's readers raise anything, from struct.error to KeyError
        raise UnreadableImage(f"{name}: {error or type(error).__name__}") from error


def _deep_grey(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I;16 and I) or of floats in [0, 1] (mode F), which PIL's own conversion would clip."""
    white = 1 if picture.mode == "F" else 65535
    values = np.asarray(picture).astype(np.float32)
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"grey values from {values.min()} to {values.max()}; they must be between 0 and {white}")
    if "transparency" in picture.info:
        values[values == picture.info["transparency"]] = white
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
