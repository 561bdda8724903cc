"""Pictures to squares. No flip and no change of colour: they would make "left of" and "red" false."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from simvlm.data.draws import Draws

LEAST_AREA_PERCENT = 90


def upright(image: Image.Image) -> np.ndarray:
    """A picture as uint8[H, W, 3]: turned as its EXIF tag says, transparency over white."""
    return np.asarray(_rgb(ImageOps.exif_transpose(image)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """The whole picture, uint8[H, W, 3], as uint8[size, size, 3]."""
    if image.shape == (size, size, 3):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(image: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """A part of the picture with at least nine tenths of its area, as uint8[size, size, 3].

    Args:
        image: uint8[H, W, 3].
        size: the side of the result.
        key: what the crop depends on and nothing else: seed, epoch, sample id.
    """
    height, width = image.shape[:2]
    draws = Draws("crop", *key)
    # Sides of at least √0.9, in ten-thousandths, so that the area holds whatever the two are.
    tall, wide = (draws.between(9487, 10_000) for _ in range(2))
    top, left = (draws.between(0, 10_000 - side) for side in (tall, wide))
    box = (
        left * width / 10_000,
        top * height / 10_000,
        (left + wide) * width / 10_000,
        (top + tall) * height / 10_000,
    )
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip to 8.
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
