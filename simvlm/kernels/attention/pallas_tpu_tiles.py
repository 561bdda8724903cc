"""What the Pallas kernels read beside q, k and v: aligned rows, the list of visible tiles, the expanded table.

A tile is one block of 128 queries of a sequence and one block of 128 of its keys. Sequences are laid so that each
begins a block, and a list names, one int32 a tile, the tiles that some query of theirs sees, in the order in which a
kernel walks them: for each block of queries its blocks of keys, or the other way round. The list is as long as the
shapes allow and the kernels' grid ends where it ends, so one program serves every layout of the same shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

Array = Any  # jax arrays and tracers

BLOCK = 128
MINOR_BITS = 12
"""of an entry: the block along the inner loop; the others hold outer block · B + sequence."""
END = -1
"""before the first entry and after the last one: of no owner."""

Q_BLOCKS, Q_LENS, K_BLOCKS, K_LENS, PREFIX_LENS, Q_OFFSETS, IMAGE_LENS = range(7)
"""Rows of `bounds` as the kernels read them: `PrefixLayout.bounds` with starts in blocks of aligned rows."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many rows of q or k there are, stored and aligned: `rows` in storage, `blocks` in all, `most` a sequence."""

    rows: int
    blocks: int
    most: int
    length: int | None  # of every sequence, in padded storage

    @classmethod
    def padded(cls, batch: int, length: int) -> Rows:
        most = ceil_div(length, BLOCK)
        return cls(batch * length, batch * most, most, length)

    @classmethod
    def packed(cls, batch: int, rows: int, longest: int, apart: bool) -> Rows:
        """`apart`: ranges do not overlap, so all of them together have no more than `rows` rows."""
        most = max(1, ceil_div(min(longest, rows), BLOCK))
        blocks = min(batch * most, (rows + (BLOCK - 1) * min(batch, rows)) // BLOCK) if apart else batch * most
        return cls(rows, max(1, blocks), most, None)


def ceil_div(n: Any, block: int) -> Any:
    return (n + block - 1) // block


def first_blocks(rows: Rows, lens: Array) -> Array:
    """int32[B]: the block of aligned rows with which each sequence begins."""
    if rows.length is not None:
        return jnp.arange(len(lens), dtype=jnp.int32) * rows.most
    blocks = ceil_div(lens, BLOCK)
    return jnp.cumsum(blocks, dtype=jnp.int32) - blocks


def align(rows: Rows, x: Array, starts: Array, lens: Array) -> Array:
    """[blocks · 128, C] from storage [rows, C], each sequence at its first block; past its end there may be anything.

    Packed keys that need more blocks than `rows` has, because they overlap although the layout says that they ascend,
    give NaN.
    """
    if rows.length is not None:
        x = x.reshape(-1, rows.length, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, -rows.length % BLOCK), (0, 0)))
        return x.reshape(-1, x.shape[-1])
    first = first_blocks(rows, lens)
    block = jnp.arange(rows.blocks)
    owner = jnp.searchsorted(first, block, side="right") - 1
    row = (starts[owner] + (block - first[owner]) * BLOCK)[:, None] + jnp.arange(BLOCK)
    x = jnp.take(x, row.reshape(-1), axis=0, mode="clip")
    enough = first[-1] + ceil_div(lens[-1], BLOCK) <= rows.blocks
    return jnp.where(enough, x, jnp.asarray(jnp.nan, x.dtype))


def store(rows: Rows, x: Array, starts: Array, lens: Array, fill: float) -> Array:
    """Storage [rows, C] or [B, T, C] from aligned rows; packed rows that no sequence owns hold `fill`."""
    if rows.length is not None:
        return x.reshape(-1, rows.most * BLOCK, x.shape[-1])[:, : rows.length]
    row = jnp.arange(rows.rows)
    owner = jnp.minimum(jnp.searchsorted(starts + lens, row, side="right"), len(starts) - 1)
    i = row - starts[owner]
    real = (i >= 0) & (i < lens[owner])
    x = jnp.take(x, first_blocks(rows, lens)[owner] * BLOCK + i, axis=0, mode="clip")
    return jnp.where(real[:, None], x, jnp.asarray(fill, x.dtype))


def most_tiles(queries: Rows, keys: Rows) -> int:
    """How many entries a list of tiles may have."""
    return min(queries.blocks * keys.most, queries.most * keys.blocks)


def tiles(queries: Rows, keys: Rows, bounds: Array, by_keys: bool) -> tuple[Array, Array]:
    """(int32[1 + entries + 1], int32[]): the list with `END` around it, and how many entries count.

    An owner is a block of queries (of keys, `by_keys`) of one sequence: all first blocks of the sequences, then all
    second ones, so that what belongs to a block's place in the sequence, as the table does, is fetched once. Owners
    of rows come even if their rows see nothing, for someone must write zeros there: in packed storage those with rows
    that count, in padded storage all.
    """
    _, q_lens, _, k_lens, prefix_lens, q_offsets, _ = bounds
    batch = q_lens.shape[0]
    owned, most, minor_most = (keys, keys.most, queries.most) if by_keys else (queries, queries.most, keys.most)
    start = (jnp.arange(most, dtype=jnp.int32) * BLOCK)[:, None]  # [outer blocks, B] from here on
    if by_keys:
        # The first key of a block is seen from query start - offset on, and by all inside the prefix.
        begin = jnp.where(start < prefix_lens, 0, jnp.maximum(start - q_offsets, 0)) // BLOCK
        end = jnp.where(start < k_lens, ceil_div(q_lens, BLOCK), 0)
        exists = start < k_lens
    else:
        last = jnp.minimum(start + BLOCK, q_lens) - 1 + q_offsets
        begin = jnp.zeros((most, batch), jnp.int32)
        end = jnp.where(start < q_lens, ceil_div(jnp.minimum(k_lens, jnp.maximum(prefix_lens, last + 1)), BLOCK), 0)
        exists = start < q_lens
    at_least = jnp.ones_like(exists) if owned.length is not None else exists
    begin = jnp.minimum(begin, minor_most - 1)
    count = jnp.maximum(end - begin, at_least).reshape(-1)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    entry = jnp.arange(most_tiles(queries, keys), dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(ends, entry, side="right"), most * batch - 1).astype(jnp.int32)
    minor = begin.reshape(-1)[owner] + entry - (ends - count)[owner]
    # An empty batch walks one tile that nobody sees.
    total = jnp.clip(ends[-1], 1, len(entry))
    listed = jnp.where(entry < ends[-1], owner << MINOR_BITS | minor, END)
    listed = listed.at[0].set(jnp.where(ends[-1] > 0, listed[0], 0))
    return jnp.pad(listed, 1, constant_values=END), total


def expanded(table: Array, grid: tuple[int, int], flipped: bool = False) -> Array:
    """float32[tiles, tiles, N, 128, 128]: the table's entries for all pairs of patches, tile by tile, zeros past them.

    [p, j] of a tile is for query p and key j; `flipped`, for query j and key p.
    """
    height, width = grid
    patches = height * width
    x = table.astype(jnp.float32)
    x = x[:, ::-1, ::-1] if flipped else x
    # Slices and not a gather: a query's column chooses a window of the table's columns, its row one of what is left
    # when rows and columns are one axis.
    x = jnp.stack([x[:, :, width - 1 - c : 2 * width - 1 - c] for c in range(width)], 1)
    x = x.reshape(len(x), width, -1)
    x = jnp.stack([x[:, :, (height - 1 - r) * width :][:, :, :patches] for r in range(height)], 1)
    x = x.reshape(len(x), patches, patches)
    side = ceil_div(patches, BLOCK)
    x = jnp.pad(x, ((0, 0), *((0, side * BLOCK - patches),) * 2))
    return x.reshape(-1, side, BLOCK, side, BLOCK).transpose(1, 3, 0, 2, 4)
