"""The forward kernel: one program per (query tile, head, sequence), an online softmax over the keys it sees.

Query i sees the first `limit = min(k_len, max(prefix_len, p + 1))` keys. So a tile of queries meets key tiles that all
its queries see (no mask code), then key tiles that some of them see, and nothing after; each kind with the table while
the keys are patches, without it after that. Scores are kept in units of log2, so that each exponential is one exp2.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from simvlm.kernels.attention.triton_gpu_table import biased_products, head_table
from simvlm.kernels.attention.triton_gpu_tiles import (
    LOG2E,
    add_mix,
    bounds_of,
    key_ranges,
    load_rows,
    locate,
    owned_rows,
    plus,
    products,
    rows_of,
    rows_until,
    scaled,
    store_rows,
    stream_rows,
    zero_where_not,
    zeros,
)

FEW = tl.constexpr(16)
"""Sequences with at most so many queries"""
CHUNK = tl.constexpr(512)
"""and more keys than this, are split into chunks of so many keys: a multiple of every tile's side."""

# Finite, because -inf - (-inf) is NaN where a query has seen nothing yet, and below every score that means anything.
_NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _attend(
    state,
    begin,
    end,
    q_tile,
    k,
    v,
    table,
    tile,
    position,
    limit,
    k_len,
    image_len,
    inverse,
    scale2,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes the key tiles from `begin` to `end` into (weighted sum of v, largest score, sum of exponentials)."""
    mixed, top, total = state
    for start in range(begin, end, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        rows = rows_until(start, k_len, MASKED, BLOCK_S)
        k_tile = stream_rows(k, start, rows, WIDTHS)
        if BIASED:
            scores = biased_products(
                q_tile, k_tile, table, tile, start // BLOCK_S, position, offs_s, image_len, inverse,
                False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
            )  # fmt: skip
        else:
            scores = products(q_tile, k_tile, None, WIDTHS, PRECISION)
        if MASKED:
            scores = tl.where(tl.arange(0, BLOCK_S)[None, :] < (limit - start)[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        weights = tl.exp2(scores * scale2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = stream_rows(v, start, rows, WIDTHS)
        mixed = add_mix(scaled(mixed, shrink[:, None], WIDTHS), weights, v_tile, WIDTHS, PRECISION)
        top = new_top
    return mixed, top, total


@triton.jit
def _attend_between(
    state,
    low,
    high,
    ranges,
    q_tile,
    k,
    v,
    table,
    tile,
    position,
    limit,
    k_len,
    image_len,
    inverse,
    scale2,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for all key tiles from `low` to `high`, by kind; `ranges` is what `key_ranges` returned."""
    biased, full, end = ranges
    end = tl.minimum(end, high)
    full = tl.minimum(full, end)
    if FORM == "none":
        biased = low
    else:
        biased = tl.maximum(tl.minimum(biased, high), low)
        both = tl.maximum(tl.minimum(biased, full), low)
        state = _attend(
            state, low, both, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse, scale2,
            True, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
        state = _attend(
            state, both, biased, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse, scale2,
            True, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
    state = _attend(
        state, biased, full, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse, scale2,
        False, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip
    return _attend(
        state, tl.maximum(biased, full), end, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse,
        scale2, False, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip


@triton.jit
def _nothing_seen(BLOCK_T: tl.constexpr, WIDTHS: tl.constexpr):
    """The state before any key."""
    return zeros(BLOCK_T, WIDTHS), tl.full([BLOCK_T], _NO_SCORE, tl.float32), tl.zeros([BLOCK_T], tl.float32)


@triton.jit
def _finished(state, mask_t, WIDTHS: tl.constexpr):
    """(out, lse) of the rows where mask_t is true; zeros and -inf where no key was seen."""
    mixed, top, total = state
    seen = mask_t & (total != 0)  # not "> 0": NaN in a sequence's own rows stays visible
    total = tl.where(seen, total, 1.0)
    mixed = zero_where_not(seen, scaled(mixed, 1.0 / total[:, None], WIDTHS), WIDTHS)
    return mixed, tl.where(seen, (top + tl.log2(total)) / LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows", "scale", "inverse"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    table,
    bounds,
    batch,
    heads,
    tiles,
    rows,
    scale,
    inverse,
    SPLIT: tl.constexpr,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes out and lse of one query tile, and zeros in the rows up to the next sequence that nobody owns.

    Also zeros, if SPLIT, for a few queries with many keys: split_kernel and join_kernel write those after it.
    """
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    k = rows_of(k, k_start, b, n, PADDED)
    v = rows_of(v, k_start, b, n, PADDED)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < q_len
    q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), first, mask_t, BLOCK_T, WIDTHS)
    position = q_offset + offs_t
    limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))
    if FORM != "none":
        table = head_table(table, n, FORM, GRID, BLOCK_T, BLOCK_S)
    ranges = key_ranges(first, q_len, k_len, prefix_len, q_offset, image_len, BLOCK_T, BLOCK_S)
    end = ranges[2]
    if SPLIT:
        end = tl.where(is_split(q_len, end), 0, end)
    state = _attend_between(
        _nothing_seen(BLOCK_T, WIDTHS), 0, end, ranges, q_tile, k, v, table, tile, position, limit, k_len, image_len,
        inverse, scale * LOG2E, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip
    mixed, logsum = _finished(state, mask_t, WIDTHS)
    out = rows_of(out, q_start, b, n, PADDED)
    lse += q_start.to(tl.int64) * heads + n
    owned = owned_rows(bounds, q_start, b, batch, rows, PADDED)
    store_rows(out, first, mixed, offs_t < owned, BLOCK_T, WIDTHS)
    tl.store(lse + offs_t.to(tl.int64) * heads, logsum, mask=offs_t < owned)
    for start in range(first + tiles * BLOCK_T, owned, tiles * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        store_rows(out, start, zeros(BLOCK_T, WIDTHS), offs_t < owned, BLOCK_T, WIDTHS)
        nothing = tl.full([BLOCK_T], float("-inf"), tl.float32)
        tl.store(lse + offs_t.to(tl.int64) * heads, nothing, mask=offs_t < owned)


# Where a few queries look at many keys (decoding), a program per head would leave a GPU idle. So their keys are split
# into chunks of a fixed size, a program each, whose states are joined in order. Which sequences are split depends on
# their own lengths alone, so that their numbers do not depend on their batch.


@triton.jit
def is_split(q_len, end):
    """Are a sequence's keys split? `end` is how many of them its queries see."""
    return (q_len <= FEW) & (end > CHUNK)


@triton.jit
def _state_at(states, chunk, chunks, n, heads, b, H: tl.constexpr):
    """Where a chunk's float32 state begins: the weighted sum of v [FEW, H], then top [FEW] and total [FEW]."""
    return states + ((b.to(tl.int64) * heads + n) * chunks + chunk) * (FEW * (H + 2))


@triton.jit(do_not_specialize=["batch", "heads", "chunks", "scale", "inverse"])
def split_kernel(
    q,
    k,
    v,
    states,
    table,
    bounds,
    batch,
    heads,
    chunks,
    scale,
    inverse,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the state of one chunk of keys of a sequence that is split."""
    H: tl.constexpr = WIDTHS[0]
    chunk, n, b = locate(chunks, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    ranges = key_ranges(0, q_len, k_len, prefix_len, q_offset, image_len, BLOCK_T, BLOCK_S)
    low = chunk * CHUNK
    k = rows_of(k, k_start, b, n, PADDED)
    v = rows_of(v, k_start, b, n, PADDED)
    if FORM != "none":
        table = head_table(table, n, FORM, GRID, BLOCK_T, BLOCK_S)
    if is_split(q_len, ranges[2]) & (low < ranges[2]):
        offs_t = tl.arange(0, BLOCK_T)
        q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), 0, offs_t < q_len, BLOCK_T, WIDTHS)
        position = q_offset + offs_t
        limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))
        mixed, top, total = _attend_between(
            _nothing_seen(BLOCK_T, WIDTHS), low, low + CHUNK, ranges, q_tile, k, v, table, 0, position, limit, k_len,
            image_len, inverse, scale * LOG2E, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
        place = _state_at(states, chunk, chunks, n, heads, b, H)
        store_rows((place, H), 0, mixed, offs_t < q_len, BLOCK_T, WIDTHS)
        tl.store(place + FEW * H + offs_t, top, mask=offs_t < q_len)
        tl.store(place + FEW * (H + 1) + offs_t, total, mask=offs_t < q_len)


@triton.jit(do_not_specialize=["batch", "heads", "chunks"])
def join_kernel(
    states,
    out,
    lse,
    bounds,
    batch,
    heads,
    chunks,
    PADDED: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Writes out and lse of a sequence that is split, from the states of its chunks."""
    H: tl.constexpr = WIDTHS[0]
    _, n, b = locate(1, heads)
    q_start, q_len, _, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    _, _, end = key_ranges(0, q_len, k_len, prefix_len, q_offset, image_len, FEW, FEW)
    if is_split(q_len, end):
        offs_t = tl.arange(0, FEW)
        mask_t = offs_t < q_len
        mixed, top, total = _nothing_seen(FEW, WIDTHS)
        for chunk in range(tl.cdiv(end, CHUNK)):
            place = _state_at(states, chunk, chunks, n, heads, b, H)
            of_chunk = load_rows((place, H), 0, mask_t, FEW, WIDTHS)
            top_of_chunk = tl.load(place + FEW * H + offs_t, mask=mask_t, other=_NO_SCORE)
            total_of_chunk = tl.load(place + FEW * (H + 1) + offs_t, mask=mask_t, other=0.0)
            new_top = tl.maximum(top, top_of_chunk)
            kept, added = tl.exp2(top - new_top), tl.exp2(top_of_chunk - new_top)
            mixed = plus(scaled(mixed, kept[:, None], WIDTHS), scaled(of_chunk, added[:, None], WIDTHS), WIDTHS)
            total = total * kept + total_of_chunk * added
            top = new_top
        mixed, logsum = _finished((mixed, top, total), mask_t, WIDTHS)
        store_rows(rows_of(out, q_start, b, n, PADDED), 0, mixed, mask_t, FEW, WIDTHS)
        tl.store(lse + (q_start.to(tl.int64) + offs_t) * heads + n, logsum, mask=mask_t)
