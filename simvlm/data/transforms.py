"""Pictures to squares. No flip and no change of colour: they would make "left of" and "red" false."""

from __future__ import annotations

import numpy as np
from PIL import Image

from simvlm.data.draws import Draws

LEAST_AREA_PERCENT = 90


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
