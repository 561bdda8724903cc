"""One global batch as U units: packed batches of equal static shapes, one to each place of a mesh. numpy alone.

A device mesh wants equal shapes everywhere, and packed sequences have all lengths. So every unit gets as many pictures
and as many sequences as any other, dealt out so that rows are even, and is packed by itself to the rows of the fullest.
Sequences that a unit is short of are empty. A picture that it is short of (a broken one was skipped) is stood in for by
another of the batch: nobody looks at it, only BatchNorm's statistics count it twice; one unit is never short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from simvlm.kernels.attention.layout import PrefixLayout, bucket
from simvlm.model.batch import IGNORED, Batch, Inputs
from simvlm.model.config import SimVLMConfig

_LAYOUTS = ("layout", "decoder_layout", "cross_layout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """What each unit has room for: sequences, pictures, rows of encoder text, rows of the decoder."""

    sequences: int
    images: int
    encoder_rows: int
    decoder_rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch], multiple: int) -> Capacity:
        """The least that these units fit in, rows rounded up to a multiple."""

        def rows(lens: str) -> int:
            return max(-(-max(int(getattr(batch, lens).sum()) for batch in batches) // multiple), 1) * multiple

        return cls(
            sequences=max(len(batch.sources) for batch in batches),
            images=max(len(batch.images) for batch in batches),
            encoder_rows=rows("encoder_text_lens"),
            decoder_rows=rows("decoder_lens"),
        )


def dealt(encoder_lens: np.ndarray, decoder_lens: np.ndarray, has_image: np.ndarray, units: int) -> np.ndarray:
    """int[B]: the unit of each sequence.

    In rounds, the longest sequences first, texts before those with a picture: in each round every unit gets one (in the
    last as many units as are left sequences), the longest to the emptiest, by encoder or decoder rows, whichever are
    less even so far. So all units get equally many of either kind, or one more.
    """
    owner, load = np.zeros(len(has_image), np.int64), np.zeros((2, units), np.int64)
    lens = np.stack([encoder_lens, decoder_lens]).astype(np.int64)
    for kind in (False, True):
        rows = np.flatnonzero(has_image == kind)
        rows = rows[np.argsort(-lens[:, rows].sum(0), kind="stable")]
        for first in range(0, len(rows), units):
            part = rows[first : first + units]
            half = int(np.ptp(load, 1).argmax())
            part = part[np.argsort(-lens[half, part], kind="stable")]
            emptiest = np.argsort(load[half], kind="stable")[: len(part)]
            owner[part] = emptiest
            load[:, emptiest] += lens[:, part]
    return owner


def split(batch: Batch, units: int) -> list[np.ndarray]:
    """The rows of the batch's arrays of sequences that each of `units` units gets, ascending."""
    if units == 1:
        return [np.arange(len(batch.sources))]
    owner = dealt(batch.encoder_text_lens, batch.decoder_lens, batch.has_image, units)
    return [np.flatnonzero(owner == unit) for unit in range(units)]


def taken(batch: Batch, rows: np.ndarray, multiple: int = 0) -> Batch:
    """The batch of some of a batch's sequences; its packed rows padded to a multiple, unless that is 0."""

    def padded(x: np.ndarray, fill: int) -> np.ndarray:
        return _longer(x, max(-(-len(x) // multiple), 1) * multiple, fill) if multiple else x

    chosen = np.zeros(len(batch.sources), bool)
    chosen[rows] = True
    of_encoder, of_decoder = (np.repeat(chosen, lens) for lens in (batch.encoder_text_lens, batch.decoder_lens))
    of_sequences = ("has_image", "encoder_text_lens", "decoder_lens", "sources", "sample_ids")
    return Batch(
        images=batch.images[chosen[batch.has_image]],
        encoder_text=padded(batch.encoder_text[: len(of_encoder)][of_encoder], 0),
        decoder_inputs=padded(batch.decoder_inputs[: len(of_decoder)][of_decoder], 0),
        targets=padded(batch.targets[: len(of_decoder)][of_decoder], IGNORED),
        **{name: getattr(batch, name)[chosen] for name in of_sequences},
    )


def stacked(batches: Sequence[Batch], config: SimVLMConfig, capacity: Capacity) -> Inputs:
    """The units' inputs with a leading axis U on every array, the layouts' bounds [U, 7, B] among them.

    `sources` is int8[U, Rd], of every decoder row (0 for spare ones, which have no loss), not of every sequence.

    Raises:
        ValueError: a unit does not fit the capacity, or the batch not the model (see `Batch.inputs`).
    """
    whole = [picture for batch in batches for picture in batch.images]
    parts = [_padded(batch, config, capacity, whole) for batch in batches]
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(Inputs):
        values = [getattr(part, field.name) for part in parts]
        if values[0] is None:
            joined[field.name] = None
        elif field.name in _LAYOUTS:
            bounds = np.stack([value.bounds for value in values])
            joined[field.name] = dataclasses.replace(values[0], bounds=bounds, **_longest(field.name, config))
        else:
            joined[field.name] = np.stack(values)
    return Inputs(**joined)


def _longest(layout: str, config: SimVLMConfig) -> dict[str, int]:
    """The longest that any sequence of the model may be, not of this batch: it is compiled in."""
    text = bucket(config.max_text_len)
    whole = bucket(config.image_len + config.max_text_len)
    return {
        "max_q_len": whole if layout == "layout" else text,
        "max_k_len": text if layout == "decoder_layout" else whole,
    }


def _padded(batch: Batch, config: SimVLMConfig, capacity: Capacity, stand_ins: list[np.ndarray]) -> Inputs:
    rows = {"encoder_text": capacity.encoder_rows, "decoder_inputs": capacity.decoder_rows}
    rows["targets"] = capacity.decoder_rows
    fills = {"encoder_text": 0, "decoder_inputs": 0, "targets": IGNORED}
    filled = {}
    for name, room in rows.items():
        used = int((batch.encoder_text_lens if name == "encoder_text" else batch.decoder_lens).sum())
        if used > room:
            raise ValueError(f"units: capacity must hold the {used} rows of {name}, got {room}")
        filled[name] = _longer(getattr(batch, name)[:used], room, fills[name])
    inputs = dataclasses.replace(batch, **filled).inputs(config)
    short = capacity.images - len(batch.images)
    if short < 0 or capacity.sequences < len(batch.sources):
        raise ValueError(f"units: capacity must hold {len(batch.images)} images, {len(batch.sources)} sequences")
    images = batch.images
    if short:
        images = np.concatenate([images, np.stack([stand_ins[i % len(stand_ins)] for i in range(short)])])
    owners = np.repeat(batch.sources, batch.decoder_lens)
    changes: dict[str, Any] = {
        "images": images,
        "image_sample_ids": _longer(inputs.image_sample_ids, capacity.images, 0),
        "sources": _longer(owners, capacity.decoder_rows, 0),
    }
    for name in ("decoder_lens", "sample_ids"):
        changes[name] = _longer(getattr(inputs, name), capacity.sequences, 0)
    for name in _LAYOUTS:
        layout: PrefixLayout | None = getattr(inputs, name)
        if layout is not None:
            changes[name] = dataclasses.replace(layout, bounds=_with_empty(layout, capacity.sequences))
    return dataclasses.replace(inputs, **changes)


def _longer(x: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.concatenate([x, np.full(length - len(x), fill, x.dtype)])


def _with_empty(layout: PrefixLayout, sequences: int) -> np.ndarray:
    """int32[7, sequences]: the layout's bounds, and empty sequences after the last."""
    bounds = np.zeros((7, sequences), np.int32)
    batch = layout.batch
    bounds[:, :batch] = layout.bounds
    if batch:
        bounds[0, batch:] = layout.bounds[0, -1] + layout.bounds[1, -1]
        bounds[2, batch:] = layout.bounds[2, -1] + layout.bounds[3, -1]
    return bounds
