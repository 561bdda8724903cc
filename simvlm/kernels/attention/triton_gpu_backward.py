"""The backward kernels: everything is recomputed tile by tile from lse, summed in a fixed order, without atomics.

With p = exp(score - lse), dp_ij = <dout_i, v_j> and delta_i = <dout_i, out_i> - dlse_i:

    ds = p · (dp - delta),  dq_i = scale · Σ_j ds_ij k_j,  dk_j = scale · Σ_i ds_ij q_i,  dv_j = Σ_i p_ij dout_i

and the table's entry for an offset sums ds over the batch and over every pair of patches that far apart: first over the
batch, into one [N, patches, I] scratch, then over the pairs.
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
    numbers_of,
    owned_rows,
    products,
    row_numbers,
    rows_of,
    rows_until,
    scaled,
    store_rows,
    stream_rows,
    zero_where_not,
    zeros,
)


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "total"])
def delta_kernel(
    dout,
    out,
    lse,
    dlse,
    lse2,
    delta,
    bounds,
    batch,
    heads,
    tiles,
    total,
    PADDED: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """delta = <dout, out> - dlse and lse2 = lse in log2 of every query, one head's numbers side by side.

    lse2 is +inf for a query that sees nothing, so that its p is 0. Rows of no query stay unwritten and are never read.
    """
    tile, n, b = locate(tiles, heads)
    q_start = tl.load(bounds + b)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tl.load(bounds + batch + b)
    dout_tile = load_rows(rows_of(dout, q_start, b, n, PADDED), first, mask_t, BLOCK_T, WIDTHS)
    out_tile = load_rows(rows_of(out, q_start, b, n, PADDED), first, mask_t, BLOCK_T, WIDTHS)
    difference = tl.sum(dout_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
    if WIDTHS[2] > 0:
        difference += tl.sum(dout_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
    number = (q_start.to(tl.int64) + offs_t) * heads + n
    difference -= tl.load(dlse + number, mask=mask_t, other=0.0)
    lse_t = tl.load(lse + number, mask=mask_t, other=0.0)
    tl.store(numbers_of(delta, q_start, n, total) + offs_t, difference, mask=mask_t)
    lse_t = tl.where(lse_t == float("-inf"), float("inf"), lse_t * LOG2E)
    tl.store(numbers_of(lse2, q_start, n, total) + offs_t, lse_t, mask=mask_t)


@triton.jit
def _add_dq(
    dq_tile,
    begin,
    end,
    q_tile,
    dout_tile,
    lse2,
    delta,
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
    """dq_tile + Σ ds · k over the key tiles from `begin` to `end`."""
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
        p = tl.exp2(scores * scale2 - lse2[:, None])
        if MASKED:
            p = tl.where(tl.arange(0, BLOCK_S)[None, :] < (limit - start)[:, None], p, 0.0)
        dp = products(dout_tile, stream_rows(v, start, rows, WIDTHS), None, WIDTHS, PRECISION)
        dq_tile = add_mix(dq_tile, p * (dp - delta[:, None]), k_tile, WIDTHS, PRECISION)
    return dq_tile


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows", "total", "scale", "inverse", "dq_scale"])
def dq_kernel(
    q,
    k,
    v,
    dout,
    lse2,
    delta,
    dq,
    table,
    bounds,
    batch,
    heads,
    tiles,
    rows,
    total,
    scale,
    inverse,
    dq_scale,
    PADDED: tl.constexpr,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dq of one query tile; it meets the key tiles in the forward kernel's order."""
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    k = rows_of(k, k_start, b, n, PADDED)
    v = rows_of(v, k_start, b, n, PADDED)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < q_len
    q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), first, mask_t, BLOCK_T, WIDTHS)
    dout_tile = load_rows(rows_of(dout, q_start, b, n, PADDED), first, mask_t, BLOCK_T, WIDTHS)
    lse2_t, delta_t = row_numbers(
        numbers_of(lse2, q_start, n, total), numbers_of(delta, q_start, n, total), offs_t, mask_t
    )
    position = q_offset + offs_t
    limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))

    biased, full, end = key_ranges(first, q_len, k_len, prefix_len, q_offset, image_len, BLOCK_T, BLOCK_S)
    scale2 = scale * LOG2E
    dq_tile = zeros(BLOCK_T, WIDTHS)
    if FORM == "none":
        biased = 0
    else:
        table = head_table(table, n, FORM, GRID, BLOCK_T, BLOCK_S)
        both = tl.minimum(biased, full)
        dq_tile = _add_dq(
            dq_tile, 0, both, q_tile, dout_tile, lse2_t, delta_t, k, v, table, tile, position, limit, k_len, image_len,
            inverse, scale2, True, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
        dq_tile = _add_dq(
            dq_tile, both, biased, q_tile, dout_tile, lse2_t, delta_t, k, v, table, tile, position, limit, k_len,
            image_len, inverse, scale2, True, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
    dq_tile = _add_dq(
        dq_tile, biased, full, q_tile, dout_tile, lse2_t, delta_t, k, v, table, tile, position, limit, k_len, image_len,
        inverse, scale2, False, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip
    dq_tile = _add_dq(
        dq_tile, tl.maximum(biased, full), end, q_tile, dout_tile, lse2_t, delta_t, k, v, table, tile, position, limit,
        k_len, image_len, inverse, scale2, False, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip

    dq_tile = zero_where_not(mask_t, scaled(dq_tile, dq_scale, WIDTHS), WIDTHS)
    dq = rows_of(dq, q_start, b, n, PADDED)
    owned = owned_rows(bounds, q_start, b, batch, rows, PADDED)
    store_rows(dq, first, dq_tile, offs_t < owned, BLOCK_T, WIDTHS)
    for start in range(first + tiles * BLOCK_T, owned, tiles * BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        store_rows(dq, start, zeros(BLOCK_T, WIDTHS), offs_t < owned, BLOCK_T, WIDTHS)


@triton.jit
def _add_dk_dv(
    sums,
    begin,
    end,
    k_tile,
    v_tile,
    q,
    dout,
    lse2,
    delta,
    table,
    tile,
    offs_s,
    since,
    q_len,
    q_offset,
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
    """(dk + Σ dsᵀ · q, dv + Σ pᵀ · dout) over the query tiles from `begin` to `end`."""
    dk_tile, dv_tile = sums
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < q_len
        position = q_offset + offs_t
        rows = rows_until(start, q_len, True, BLOCK_T)
        q_tile, dout_tile = stream_rows(q, start, rows, WIDTHS), stream_rows(dout, start, rows, WIDTHS)
        lse2_t, delta_t = row_numbers(lse2, delta, offs_t, mask_t)
        # Transposed, keys × queries, so that both sums below take their weights as they come out of the products.
        if BIASED:
            scores = biased_products(
                k_tile, q_tile, table, tile, start // BLOCK_T, position, offs_s, image_len, inverse,
                True, FORM, GRID, WIDTHS, BLOCK_S, BLOCK_T, WARPS, PRECISION,
            )  # fmt: skip
        else:
            scores = products(k_tile, q_tile, None, WIDTHS, PRECISION)
        p = tl.exp2(scores * scale2 - lse2_t[None, :])
        if MASKED:
            p = tl.where(tl.arange(0, BLOCK_T)[None, :] >= (since - start)[:, None], p, 0.0)
        dv_tile = add_mix(dv_tile, p, dout_tile, WIDTHS, PRECISION)
        dp = products(v_tile, dout_tile, None, WIDTHS, PRECISION)
        dk_tile = add_mix(dk_tile, p * (dp - delta_t[None, :]), q_tile, WIDTHS, PRECISION)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows", "total", "scale", "inverse"])
def dk_dv_kernel(
    q,
    k,
    v,
    dout,
    lse2,
    delta,
    dk,
    dv,
    table,
    bounds,
    batch,
    heads,
    tiles,
    rows,
    total,
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
    """Writes dk and dv of one key tile, over the query tiles that see any of it: some only in part, then all of it."""
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    q = rows_of(q, q_start, b, n, PADDED)
    dout = rows_of(dout, q_start, b, n, PADDED)
    lse2 = numbers_of(lse2, q_start, n, total)
    delta = numbers_of(delta, q_start, n, total)
    first = tile * BLOCK_S
    offs_s = first + tl.arange(0, BLOCK_S)
    mask_s = offs_s < k_len
    k_tile = load_rows(rows_of(k, k_start, b, n, PADDED), first, mask_s, BLOCK_S, WIDTHS)
    v_tile = load_rows(rows_of(v, k_start, b, n, PADDED), first, mask_s, BLOCK_S, WIDTHS)

    last = tl.minimum(first + BLOCK_S, k_len) - 1
    end = tl.where(first < k_len, q_len, 0)
    # Key j is seen by every query from j - q_offset on, and by all of them inside the prefix.
    since = tl.where(offs_s < prefix_len, 0, offs_s - q_offset)
    some = tl.where(first < prefix_len, 0, tl.maximum(first - q_offset, 0)) // BLOCK_T * BLOCK_T
    full = tl.where(last < prefix_len, 0, tl.cdiv(tl.maximum(last - q_offset, 0), BLOCK_T) * BLOCK_T)
    scale2 = scale * LOG2E
    sums = zeros(BLOCK_S, WIDTHS), zeros(BLOCK_S, WIDTHS)
    biased = 0
    if FORM != "none":
        patches = tl.where(first < image_len, tl.minimum(tl.maximum(image_len - q_offset, 0), end), 0)
        biased = tl.cdiv(patches, BLOCK_T) * BLOCK_T
        table = head_table(table, n, FORM, GRID, BLOCK_S, BLOCK_T)
        sums = _add_dk_dv(
            sums, some, tl.minimum(biased, full), k_tile, v_tile, q, dout, lse2, delta, table, tile, offs_s, since,
            q_len, q_offset, image_len, inverse, scale2,
            True, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
    sums = _add_dk_dv(
        sums, tl.maximum(some, biased), tl.minimum(full, end), k_tile, v_tile, q, dout, lse2, delta, table, tile,
        offs_s, since, q_len, q_offset, image_len, inverse, scale2,
        False, True, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip
    if FORM != "none":
        sums = _add_dk_dv(
            sums, full, biased, k_tile, v_tile, q, dout, lse2, delta, table, tile, offs_s, since, q_len, q_offset,
            image_len, inverse, scale2, True, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
    sums = _add_dk_dv(
        sums, tl.maximum(full, biased), end, k_tile, v_tile, q, dout, lse2, delta, table, tile, offs_s, since, q_len,
        q_offset, image_len, inverse, scale2,
        False, False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
    )  # fmt: skip

    dk_tile = zero_where_not(mask_s, scaled(sums[0], scale, WIDTHS), WIDTHS)
    dv_tile = zero_where_not(mask_s, sums[1], WIDTHS)
    dk = rows_of(dk, k_start, b, n, PADDED)
    dv = rows_of(dv, k_start, b, n, PADDED)
    owned = owned_rows(bounds + 2 * batch, k_start, b, batch, rows, PADDED)
    store_rows(dk, first, dk_tile, offs_s < owned, BLOCK_S, WIDTHS)
    store_rows(dv, first, dv_tile, offs_s < owned, BLOCK_S, WIDTHS)
    for start in range(first + tiles * BLOCK_S, owned, tiles * BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        store_rows(dk, start, zeros(BLOCK_S, WIDTHS), offs_s < owned, BLOCK_S, WIDTHS)
        store_rows(dv, start, zeros(BLOCK_S, WIDTHS), offs_s < owned, BLOCK_S, WIDTHS)
    if not PADDED and b == 0:
        # Packed keys may begin past row 0 (k_starts); what is before the first sequence is nobody's either.
        for start in range(first, k_start, tiles * BLOCK_S):
            offs_s = start - k_start + tl.arange(0, BLOCK_S)
            store_rows(dk, start - k_start, zeros(BLOCK_S, WIDTHS), offs_s < 0, BLOCK_S, WIDTHS)
            store_rows(dv, start - k_start, zeros(BLOCK_S, WIDTHS), offs_s < 0, BLOCK_S, WIDTHS)
