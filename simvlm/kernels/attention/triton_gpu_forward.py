"""The forward kernel: one program per (query tile, head, sequence), an online softmax over the keys it sees.

Query i sees the first `limit = min(k_len, max(prefix_len, p + 1))` keys. So a tile of queries meets key tiles that all
its queries see (no mask code), then key tiles that some of them see, and nothing after; each kind with the table while
the keys are patches, without it after that. Scores are kept in units of log2, so that each exponential is one exp2.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from simvlm.kernels.attention.triton_gpu_tiles import (
    LOG2E,
    add_mix,
    bias2,
    bounds_of,
    head_table,
    load_rows,
    locate,
    numbers_of,
    owned_rows,
    products,
    rows_of,
    scaled,
    store_rows,
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
    position,
    limit,
    k_len,
    image_len,
    scale2,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes the key tiles from `begin` to `end` into (weighted sum of v, largest score, sum of exponentials)."""
    mixed, top, total = state
    for start in range(begin, end, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < k_len
        scores = products(q_tile, load_rows(k, start, mask_s, MASKED, BLOCK_S, WIDTHS), WIDTHS, PRECISION) * scale2
        if BIASED:
            scores += bias2(table, position[:, None], offs_s[None, :], image_len, GRID)
        if MASKED:
            scores = tl.where(offs_s[None, :] < limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v, start, mask_s, MASKED, BLOCK_S, WIDTHS)
        mixed = add_mix(scaled(mixed, shrink[:, None], WIDTHS), weights, v_tile, WIDTHS, PRECISION)
        top = new_top
    return mixed, top, total


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows"])
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
    PADDED: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
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
    position = q_offset + offs_t
    limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))

    last = tl.minimum(first + BLOCK_T, q_len)
    end = tl.where(first < q_len, tl.minimum(k_len, tl.maximum(prefix_len, q_offset + last)), 0)
    full = tl.minimum(tl.minimum(k_len, tl.maximum(prefix_len, q_offset + first + 1)), end) // BLOCK_S * BLOCK_S
    scale2 = scale * LOG2E
    state = zeros(BLOCK_T, WIDTHS), tl.full([BLOCK_T], _NO_SCORE, tl.float32), tl.zeros([BLOCK_T], tl.float32)
    biased = 0
    if GRID is not None:
        patches = tl.where(q_offset + first < image_len, tl.minimum(image_len, end), 0)
        biased = tl.cdiv(patches, BLOCK_S) * BLOCK_S
        table = head_table(table, n, GRID)
        both = tl.minimum(biased, full)
        state = _attend(
            state, 0, both, q_tile, k, v, table, position, limit, k_len, image_len, scale2,
            True, False, GRID, WIDTHS, BLOCK_S, PRECISION,
        )  # fmt: skip
        state = _attend(
            state, both, biased, q_tile, k, v, table, position, limit, k_len, image_len, scale2,
            True, True, GRID, WIDTHS, BLOCK_S, PRECISION,
        )  # fmt: skip
    state = _attend(
        state, biased, full, q_tile, k, v, table, position, limit, k_len, image_len, scale2,
        False, False, GRID, WIDTHS, BLOCK_S, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, tl.maximum(biased, full), end, q_tile, k, v, table, position, limit, k_len, image_len, scale2,
        False, True, GRID, WIDTHS, BLOCK_S, PRECISION,
    )  # fmt: skip

    mixed, top, total = state
    seen = mask_t & (total != 0)  # not "> 0": NaN in a sequence's own rows stays visible
    total = tl.where(seen, total, 1.0)
    mixed = zero_where_not(seen, scaled(mixed, 1.0 / total[:, None], WIDTHS), WIDTHS)
    logsum = tl.where(seen, (top + tl.log2(total)) / LOG2E, float("-inf"))

    out = rows_of(out, q_start, b, n, PADDED)
    lse, stride_lse = numbers_of(lse, q_start, n, heads)
    owned = owned_rows(bounds, q_start, b, batch, rows, PADDED)
    store_rows(out, first, mixed, offs_t < owned, BLOCK_T, WIDTHS)
    tl.store(lse + offs_t.to(tl.int64) * stride_lse, logsum, mask=offs_t < owned)
    for start in range(first + tiles * BLOCK_T, owned, tiles * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        store_rows(out, start, zeros(BLOCK_T, WIDTHS), offs_t < owned, BLOCK_T, WIDTHS)
        nothing = tl.full([BLOCK_T], float("-inf"), tl.float32)
        tl.store(lse + offs_t.to(tl.int64) * stride_lse, nothing, mask=offs_t < owned)
