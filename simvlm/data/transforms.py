"""Pictures to squares. No flip and no change of colour: they would make "left of" and "red" false."""

from __future__ import annotations

import math

import numpy as np
from PIL import ExifTags, Image, ImageOps

from simvlm.data.draws import Draws

_LEAST_SIDE = 9487


def upright(image: Image.Image) -> Image.Image:
    """A picture in RGB: turned as its EXIF tag says, transparency over white; itself where it is so already."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _rgb(image)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The whole picture, uint8[H, W, 3], as uint8[size, size, 3]."""
    if image.shape == (size, size, 3):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(image: np.ndarray | Image.Image, size: int, *key: int | str) -> np.ndarray:
    """A part of the picture with at least nine tenths of its area, as uint8[size, size, 3].

    Args:
        image: uint8[H, W, 3], or in RGB.
        size: the side of the result.
        key: what the crop depends on and nothing else: seed, epoch, sample id.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    width, height = picture.size
    draws = Draws("crop", *key)
    # Sides of at least √0.9, in ten-thousandths, so that the area holds whatever the two are.
    tall, wide = (draws.between(_LEAST_SIDE, 10_000) for _ in range(2))
    top, left = (draws.between(0, 10_000 - side) for side in (tall, wide))
    box = (
        left * width / 10_000,
        top * height / 10_000,
        (left + wide) * width / 10_000,
        (top + tall) * height / 10_000,
    )
    # The gap: from four times the size on, pixels are averaged before they are filtered.
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def least_side(size: int) -> int:
    """The side that a picture needs for any crop of it to have `size` pixels."""
    return math.ceil(size * 10_000 / _LEAST_SIDE)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip to 8.
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
