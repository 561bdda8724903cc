"""RandAugment (Cubuk et al. 2020): each picture goes through N = 2 of 14 operations, all with magnitude M = 9 of 10.

Whether SimVLM was finetuned with it could not be verified. The operations are the paper's, none of which flips; their
ranges are AutoAugment's (Cubuk et al. 2019), recalled, each in the direction in which the change grows. They move
shapes and change colours: not for the generated world, whose questions ask for both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from simvlm.data.draws import Draws

N, M = 2, 9
_STRENGTH = M / 10
_FILL = (128, 128, 128)
"""of what comes into sight at the edges"""


def rand_augment(image: np.ndarray, *key: int | str) -> np.ndarray:
    """The picture after `N` operations, uint8[H, W, 3] as it came.

    Args:
        image: uint8[H, W, 3].
        key: what the choice depends on and nothing else: seed, epoch, example, which of its pictures.
    """
    draws = Draws("rand_augment", *key)
    picture = Image.fromarray(image)
    for _ in range(N):
        operation = OPERATIONS[draws.choose(tuple(OPERATIONS))]
        picture = operation(picture, draws.choose((-_STRENGTH, _STRENGTH)))
    return np.asarray(picture)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, strength: kind(picture).enhance(1 + 0.9 * strength)


def _moved(picture: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Pixel (x, y) of the result is (a x + b y + c, d x + e y + f) of the picture, both from its centre."""
    x, y = picture.width / 2, picture.height / 2
    matrix = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda picture, strength: picture,
    "autocontrast": lambda picture, strength: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength: ImageOps.equalize(picture),
    "rotate": lambda picture, strength: picture.rotate(
        30 * strength, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    ),
    "solarize": lambda picture, strength: ImageOps.solarize(picture, round(256 * (1 - abs(strength)))),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": lambda picture, strength: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda picture, strength: _moved(picture, 1, 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda picture, strength: _moved(picture, 1, 0, 0, 0.3 * strength, 1, 0),
    "translate_x": lambda picture, strength: _moved(picture, 1, 0, 0.45 * strength * picture.width, 0, 1, 0),
    "translate_y": lambda picture, strength: _moved(picture, 1, 0, 0, 0, 1, 0.45 * strength * picture.height),
}
"""By name; each takes a picture and a strength of -1 … 1, whose sign some have no use for."""
