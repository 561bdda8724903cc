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
    products,
    rows_of,
    scaled,
    store_rows,
    times,
    zero_where_not,
    zeros,
)

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
        mask_s = offs_s < k_len
        k_tile = load_rows(k, start, mask_s, MASKED, BLOCK_S, WIDTHS)
        if BIASED:
            scores = biased_products(
                q_tile, k_tile, table, tile, start // BLOCK_S, position, offs_s, image_len, inverse,
                False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
            )  # fmt: skip
        else:
            scores = products(q_tile, k_tile, None, WIDTHS, PRECISION)
        if MASKED:
            scores = tl.where(offs_s[None, :] < limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        weights = tl.exp2(scores * scale2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v, start, mask_s, MASKED, BLOCK_S, WIDTHS)
        mixed = add_mix(scaled(mixed, shrink[:, None], WIDTHS), weights, v_tile, WIDTHS, PRECISION)
        top = new_top
    return mixed, top, total


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows", "factor", "rest", "inverse"])
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
    factor,
    rest,
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
    """Writes out and lse of one query tile, and zeros in the rows up to the next sequence that nobody owns."""
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    k = rows_of(k, k_start, b, n, PADDED)
    v = rows_of(v, k_start, b, n, PADDED)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < q_len
    q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), first, mask_t, True, BLOCK_T, WIDTHS)
    q_tile = times(q_tile, factor, WIDTHS)
    position = q_offset + offs_t
    limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))

    biased, full, end = key_ranges(first, q_len, k_len, prefix_len, q_offset, image_len, BLOCK_T, BLOCK_S)
    scale2 = rest * LOG2E
    state = zeros(BLOCK_T, WIDTHS), tl.full([BLOCK_T], _NO_SCORE, tl.float32), tl.zeros([BLOCK_T], tl.float32)
    if FORM == "none":
        biased = 0
    else:
        table = head_table(table, n, FORM, GRID, BLOCK_T, BLOCK_S)
        both = tl.minimum(biased, full)
        state = _attend(
            state, 0, both, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse, scale2,
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
    state = _attend(
        state, tl.maximum(biased, full), end, q_tile, k, v, table, tile, position, limit, k_len, image_len, inverse,
        scale2, False, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip

    mixed, top, total = state
    seen = mask_t & (total != 0)  # not "> 0": NaN in a sequence's own rows stays visible
    total = tl.where(seen, total, 1.0)
    mixed = zero_where_not(seen, scaled(mixed, 1.0 / total[:, None], WIDTHS), WIDTHS)
    logsum = tl.where(seen, (top + tl.log2(total)) / LOG2E, float("-inf"))

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
