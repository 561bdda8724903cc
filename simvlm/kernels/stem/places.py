"""Where `embed_sequence` puts what: five integers per sequence, read off a `PrefixLayout`, in any array library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PLACES = ("q_starts", "q_lens", "image_lens", "image_index", "text_starts")
"""The rows of `places`. Position i of sequence b is storage row `q_starts[b] + i`; it holds patch i of image
`image_index[b]` where `i < image_lens[b]`, else row `text_starts[b] + i - image_lens[b]` of the text."""


def places(bounds: Any, stack: Callable[[Any], Any]) -> Any:
    """int32[5, B]: the rows named in `PLACES`; waits for no device.

    Args:
        bounds: `PrefixLayout.bounds`, numpy, torch or jax.
        stack: that library's `stack`.
    """
    q_starts, q_lens, image_lens = bounds[0], bounds[1], bounds[6]
    has_image, text_lens = image_lens.clip(0, 1), (q_lens - image_lens).clip(0)
    image_index = has_image.cumsum(0, dtype=bounds.dtype) - has_image
    text_starts = text_lens.cumsum(0, dtype=bounds.dtype) - text_lens
    return stack([q_starts, q_lens, image_lens, image_index, text_starts])


def rows_shape(
    image_shape: tuple[int, ...] | None, text_rows: int, width: int, batch: int, query_len: int | None
) -> tuple[int, ...]:
    """[B, T, D] with a padded layout (`query_len` = T), else [R, D]: R = Bi·I + Rt, all patches and text rows."""
    if query_len is not None:
        return batch, query_len, width
    patches = image_shape[0] * image_shape[1] * image_shape[2] if image_shape is not None else 0
    return patches + text_rows, width
