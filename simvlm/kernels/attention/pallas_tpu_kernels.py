"""The Pallas kernels: forward, dq (with the table's pairs), dk and dv; one grid step a tile and group of heads.

Blocks lie as storage does, [128 rows, heads of the group · H]: no head is moved or padded, a head is a slice of lanes.
Forward and dq hold scores as [queries, keys] and a row's statistics as columns; dk and dv hold them as [keys, queries]
and statistics as rows, so that no product needs a transposed left side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from simvlm.kernels.attention.pallas_tpu_tiles import (
    BLOCK,
    IMAGE_LENS,
    K_LENS,
    MINOR_BITS,
    PREFIX_LENS,
    Q_LENS,
    Q_OFFSETS,
    ceil_div,
)

Ref = Any
Array = Any

# Finite, because -inf - (-inf) is NaN where a query has seen nothing yet, and below every score that means anything.
_NO_SCORE = -1.0e30


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is static in a kernel.

    Attributes:
        batch: sequences.
        heads, head_dim: of one step.
        dtype: of q, k, v and the 16-bit factors P and dS.
        widened: products take float32 operands, because the TPU multiplies no bfloat16 that a kernel gives it; the
            values are bfloat16's still, so that one pass of the unit is exact.
        patches: of the grid, 0 without a table.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: Any
    widened: bool
    scale: float
    patches: int

    @property
    def image_blocks(self) -> int:
        return ceil_div(self.patches, BLOCK)

    def lanes(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """float32 products of a and b, which are of `dtype` or, as P and dS, rounded to it."""
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if self.widened:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def owner_of(tiles: Ref, step: Any) -> Any:
    """Outer block · B + sequence of the tile of a grid step; of `END`, negative."""
    return tiles[step + 1] >> MINOR_BITS


def minor_of(tiles: Ref, step: Any) -> Any:
    return tiles[step + 1] & ((1 << MINOR_BITS) - 1)


class _Tile:
    """The tile of this grid step: its place in the sequence, and who sees whom in it."""

    def __init__(self, shape: Shape, tiles: Ref, bounds: Ref, by_keys: bool) -> None:
        step = pl.program_id(1)
        owner = owner_of(tiles, step)
        before = owner_of(tiles, step - 1)
        self.first = before != owner
        self.last = owner_of(tiles, step + 1) != owner
        sequence, outer, self.minor = lax.rem(owner, shape.batch), lax.div(owner, shape.batch), minor_of(tiles, step)
        self.first_of_outer = (before < 0) | (lax.div(before, shape.batch) != outer)
        self.outer = outer
        t, s = (self.minor, outer) if by_keys else (outer, self.minor)
        q_len, k_len, prefix_len, q_offset, image_len = (
            bounds[row * shape.batch + sequence] for row in (Q_LENS, K_LENS, PREFIX_LENS, Q_OFFSETS, IMAGE_LENS)
        )
        self.queries, self.keys = q_len - t * BLOCK, k_len - s * BLOCK  # how many are real: these or fewer
        self.prefix, self.ahead = prefix_len - s * BLOCK, q_offset + (t - s) * BLOCK
        seen_by_all = jnp.minimum(self.keys, jnp.maximum(self.prefix, self.ahead + 1))
        self.cut = (self.queries < BLOCK) | (seen_by_all < BLOCK)
        self.biased = (t * BLOCK < image_len) & (s * BLOCK < image_len)
        self.table_minor = jnp.minimum(self.minor, max(shape.image_blocks - 1, 0))

    def seen(self, query_axis: int) -> Array:
        """bool[128, 128]: who sees whom, queries along `query_axis`."""
        i = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), query_axis)
        j = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1 - query_axis)
        limit = jnp.minimum(self.keys, jnp.maximum(self.prefix, self.ahead + 1 + i))
        return (j < limit) & (i < self.queries)


def _each_kind(tile: _Tile, attend: Callable[[bool], None]) -> None:
    """attend(cut) for the one kind that the tile is of: only a cut one masks."""
    for cut in (False, True):
        pl.when(tile.cut if cut else jnp.logical_not(tile.cut))(functools.partial(attend, cut))


def _table(shape: Shape, refs: list[Ref]) -> tuple[Ref | None, list[Ref]]:
    """The expanded table's block, where there is one, and the references after it."""
    return (refs[0], refs[1:]) if shape.patches else (None, refs)


def _biased(tile: _Tile, bias: Ref | None, head: int, scores: Array) -> Array:
    """A choice of numbers, not of code: bodies with and without a bias would take twice as long to compile."""
    if bias is None:
        return scores
    return scores + jnp.where(tile.biased, bias[0, tile.table_minor, head], 0.0)


def _rows(shape: Shape, ref: Ref, head: int, real: Any, cut: bool) -> Array:
    """[128, H] of one head; past the sequence's end zeros, whatever is there."""
    x = ref[:, shape.lanes(head)]
    if not cut:
        return x
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < real, x.astype(jnp.float32), 0.0)


def forward_kernel(shape: Shape, tiles: Ref, bounds: Ref, *refs: Any) -> None:
    """out and lse by online softmax, a block of queries after the other, its blocks of keys in turn."""
    q, k, v, *others = refs
    bias, (out, lse, mixed, top, total) = _table(shape, others)
    tile = _Tile(shape, tiles, bounds, by_keys=False)

    @pl.when(tile.first)
    def _() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, _NO_SCORE)
        total[...] = jnp.zeros_like(total)

    def attend(cut: bool) -> None:
        seen = tile.seen(0) if cut else None
        for head in range(shape.heads):
            lanes = shape.lanes(head)
            scores = shape.dot(q[:, lanes], k[:, lanes], (1, 1)) * shape.scale
            scores = _biased(tile, bias, head, scores)
            if seen is not None:
                scores = jnp.where(seen, scores, -jnp.inf)
            old = top[head]
            new = jnp.maximum(old, scores.max(1, keepdims=True))
            p, shrink = jnp.exp(scores - new), jnp.exp(old - new)
            top[head] = new
            total[head] = total[head] * shrink + p.sum(1, keepdims=True)
            rows = _rows(shape, v, head, tile.keys, cut)
            mixed[:, lanes] = mixed[:, lanes] * shrink + shape.dot(p, rows, (1, 0))

    _each_kind(tile, attend)

    @pl.when(tile.last)
    def _() -> None:
        for head in range(shape.heads):
            sums = total[head]
            some = sums > 0
            sums = jnp.where(some, sums, 1.0)
            out[:, shape.lanes(head)] = (mixed[:, shape.lanes(head)] / sums).astype(out.dtype)
            lse[0, :, head : head + 1] = jnp.where(some, top[head] + jnp.log(sums), -jnp.inf)


def dq_kernel(shape: Shape, tiles: Ref, bounds: Ref, *refs: Any) -> None:
    """dq, and the sum over the batch of dS for each pair of patches, walked as forward does."""
    q, k, v, dout, lse, delta, *others = refs
    bias, (dq, *pairs_ref, acc) = _table(shape, others)
    pairs = pairs_ref[0] if pairs_ref else None
    tile = _Tile(shape, tiles, bounds, by_keys=False)

    @pl.when(tile.first)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    if pairs is not None:

        @pl.when(tile.first_of_outer & (tile.outer < shape.image_blocks))
        def _() -> None:
            pairs[...] = jnp.zeros_like(pairs)

    def attend(cut: bool) -> None:
        seen = tile.seen(0) if cut else None
        for head in range(shape.heads):
            lanes = shape.lanes(head)
            keys = _rows(shape, k, head, tile.keys, cut)
            scores = shape.dot(q[:, lanes], keys, (1, 1)) * shape.scale
            scores = _biased(tile, bias, head, scores)
            p = jnp.exp(scores - lse[0, :, head : head + 1])
            ds = p * (shape.dot(dout[:, lanes], v[:, lanes], (1, 1)) - delta[0, :, head : head + 1])
            if seen is not None:
                ds = jnp.where(seen, ds, 0.0)
            if pairs is not None:
                pairs[0, tile.table_minor, head] += jnp.where(tile.biased, ds, 0.0)
            acc[:, lanes] += shape.dot(ds, keys, (1, 0))

    _each_kind(tile, attend)

    @pl.when(tile.last)
    def _() -> None:
        dq[...] = (acc[...] * shape.scale).astype(dq.dtype)


def dkv_kernel(shape: Shape, tiles: Ref, bounds: Ref, *refs: Any) -> None:
    """dk and dv, a block of keys after the other, the blocks of queries that see it in turn."""
    q, k, v, dout, lse, delta, *others = refs
    bias, (dk, dv, k_acc, v_acc) = _table(shape, others)
    tile = _Tile(shape, tiles, bounds, by_keys=True)

    @pl.when(tile.first)
    def _() -> None:
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def attend(cut: bool) -> None:
        seen = tile.seen(1) if cut else None
        for head in range(shape.heads):
            lanes = shape.lanes(head)
            queries = _rows(shape, q, head, tile.queries, cut)
            douts = _rows(shape, dout, head, tile.queries, cut)
            scores = shape.dot(k[:, lanes], queries, (1, 1)) * shape.scale
            scores = _biased(tile, bias, head, scores)
            p = jnp.exp(scores - lse[0, head : head + 1, :])
            if seen is not None:
                p = jnp.where(seen, p, 0.0)
            ds = p * (shape.dot(v[:, lanes], douts, (1, 1)) - delta[0, head : head + 1, :])
            if seen is not None:
                ds = jnp.where(seen, ds, 0.0)
            v_acc[:, lanes] += shape.dot(p, douts, (1, 0))
            k_acc[:, lanes] += shape.dot(ds, queries, (1, 0))

    _each_kind(tile, attend)

    @pl.when(tile.last)
    def _() -> None:
        dk[...] = (k_acc[...] * shape.scale).astype(dk.dtype)
        dv[...] = v_acc[...].astype(dv.dtype)
