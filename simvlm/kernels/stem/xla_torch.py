"""The stem's ops in plain torch operations of static shapes, for torch_xla: TPUs, and whatever else XLA compiles to.

`batch_norm_act` is the reference's four halves: its formulas are those that XLA fuses around the sums. `embed_sequence`
moves rows by gathers alone, forward and backward: which row feeds a storage row, and which storage row a patch or text
row feeds, are both read off `places` on the device. Sums are float32 and have a fixed order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simvlm.kernels import xla_device
from simvlm.kernels.stem.places import rows_shape
from simvlm.kernels.stem.reference import (
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_reductions,
    batch_norm_statistics,
)

__all__ = [
    "batch_norm_apply",
    "batch_norm_backward_apply",
    "batch_norm_backward_reductions",
    "batch_norm_statistics",
    "batch_norm_unsupported",
    "embed_sequence",
    "embed_sequence_backward",
    "embed_unsupported",
    "unavailable",
]


def unavailable() -> str | None:
    return xla_device.unavailable()


def batch_norm_unsupported(x: Tensor) -> str | None:
    return xla_device.unsupported("x", x)


def embed_unsupported(text: Tensor, weight: Tensor | None) -> str | None:
    return xla_device.unsupported("text", text) or (None if weight is None else xla_device.imprecise("text", text))


def embed_sequence(
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    image_positions: Tensor | None,
    text: Tensor,
    places: Tensor,
    query_len: int | None,
) -> Tensor:
    """rows in text's dtype; a patch or text row that `places` asks for and that does not exist gives 0."""
    image_shape = None if features is None else tuple(features.shape)
    text_rows, width = text.shape
    shape = rows_shape(image_shape, text_rows, width, places.shape[1], query_len)
    q_starts, q_lens, image_lens, image_index, text_starts = _with_an_empty_sequence(places)
    owner, i, owned = xla_device.owners(q_starts, q_lens, math.prod(shape[:-1]))
    patches_of, index_of, text_of = (x.index_select(0, owner) for x in (image_lens, image_index, text_starts))
    in_image, text_row = i < patches_of, text_of + i - patches_of
    rows = xla_device.take(text, text_row, owned & ~in_image & (text_row < text_rows))
    if features is not None:
        x = features.flatten(1, 2)
        if weight is not None:
            with torch.autocast(text.device.type, enabled=False):
                x = x.float() @ weight.float().T
        x = x.float()
        if bias is not None:
            x = x + bias.float()
        if image_positions is not None:
            x = x + image_positions.float()
        patch = index_of * x.shape[1] + i
        projected = xla_device.take(x.flatten(0, 1), patch, owned & (index_of < x.shape[0]))
        rows = torch.where(in_image[:, None], projected.to(rows.dtype), rows)
    return rows.reshape(shape)


def embed_sequence_backward(
    drows: Tensor,
    features: Tensor | None,
    weight: Tensor | None,
    places: Tensor,
    image_shape: tuple[int, ...] | None,
    text_rows: int,
    query_len: int | None,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """(dfeatures, dweight, dbias, dimage_positions, dtext), None where not wanted; parameters' float32.

    `features` is None where weight is.
    """
    q_starts, q_lens, image_lens, image_index, text_starts = _with_an_empty_sequence(places)
    drows = drows.reshape(-1, drows.shape[-1])
    has_image = image_lens.clip(0, 1)
    owner, i, owned = xla_device.owners(text_starts, (q_lens - image_lens).clip(0), text_rows)
    ends = (q_starts + image_lens).index_select(0, owner)
    grads: list[Tensor | None] = [None, None, None, None, xla_device.take(drows, ends + i, owned)]
    if image_shape is not None:
        images, patches = image_shape[0], image_shape[1] * image_shape[2]
        owner, _, real = xla_device.owners(image_index, has_image, images)
        i = torch.arange(patches, dtype=places.dtype, device=places.device)
        shown = real[:, None] & (i < torch.minimum(q_lens, image_lens).index_select(0, owner)[:, None])
        dimages = xla_device.take(drows, q_starts.index_select(0, owner)[:, None] + i, shown).float()
        dx = dimages
        if features is not None and weight is not None:
            with torch.autocast(drows.device.type, enabled=False):
                dx = dimages @ weight.float()
                # Images beyond the sequences' own may hold NaN, which times 0 would reach dweight.
                x = torch.where(real[:, None, None], features.flatten(1, 2), 0.0).float()
                grads[1] = dimages.flatten(0, 1).T @ x.flatten(0, 1)
        grads[0] = dx.reshape(image_shape).to(drows.dtype)
        grads[2], grads[3] = dimages.sum((0, 1)), dimages.sum(0)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _with_an_empty_sequence(places: Tensor) -> list[Tensor]:
    """The rows of `places`, one that owns nothing in front: there is a sequence to name then, whatever the batch."""
    return xla_device.unstacked(torch.cat([places.new_zeros(places.shape[0], 1), places], 1))
