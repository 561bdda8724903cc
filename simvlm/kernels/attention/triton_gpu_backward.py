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


@triton.jit(do_not_specialize=["stride_b", "stride_t", "stride_n", "batch", "heads", "tiles"])
def delta_kernel(
    dout,
    out,
    dlse,
    stride_b,
    stride_t,
    stride_n,
    delta,
    bounds,
    batch,
    heads,
    tiles,
    PADDED: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """delta = <dout, out> - dlse of every query; other rows stay unwritten and are never read."""
    tile, n, b = locate(tiles, heads)
    q_start = tl.load(bounds + b)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tl.load(bounds + batch + b)
    dout_tile = load_rows(rows_of(dout, q_start, b, n, PADDED), first, mask_t, True, BLOCK_T, WIDTHS)
    out_tile = load_rows(rows_of(out, q_start, b, n, PADDED), first, mask_t, True, BLOCK_T, WIDTHS)
    total = tl.sum(dout_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
    if WIDTHS[2] > 0:
        total += tl.sum(dout_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
    dlse, stride_dlse = rows_of((dlse, stride_b, stride_t, stride_n), q_start, b, n, PADDED)
    total -= tl.load(dlse + offs_t.to(tl.int64) * stride_dlse, mask=mask_t, other=0.0)
    delta, stride_delta = numbers_of(delta, q_start, n, heads)
    tl.store(delta + offs_t.to(tl.int64) * stride_delta, total, mask=mask_t)


@triton.jit
def _row_numbers(lse, delta, offs_t, mask_t):
    """(lse in log2, delta) of a query tile; lse is +inf where p must be 0: no key is seen, or no query is there."""
    lse_t = tl.load(lse[0] + offs_t.to(tl.int64) * lse[1], mask=mask_t, other=float("inf"))
    delta_t = tl.load(delta[0] + offs_t.to(tl.int64) * delta[1], mask=mask_t, other=0.0)
    return tl.where(lse_t == float("-inf"), float("inf"), lse_t * LOG2E), delta_t


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
    """dq_tile + Σ ds · k over the key tiles from `begin` to `end`."""
    for start in range(begin, end, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < k_len
        k_tile = load_rows(k, start, mask_s, MASKED, BLOCK_S, WIDTHS)
        scores = products(q_tile, k_tile, WIDTHS, PRECISION) * scale2
        if BIASED:
            scores += bias2(table, position[:, None], offs_s[None, :], image_len, GRID)
        p = tl.exp2(scores - lse2[:, None])
        if MASKED:
            p = tl.where(offs_s[None, :] < limit[:, None], p, 0.0)
        dp = products(dout_tile, load_rows(v, start, mask_s, MASKED, BLOCK_S, WIDTHS), WIDTHS, PRECISION)
        dq_tile = add_mix(dq_tile, p * (dp - delta[:, None]), k_tile, WIDTHS, PRECISION)
    return dq_tile


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows"])
def dq_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
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
    """Writes dq of one query tile; it meets the key tiles in the forward kernel's order."""
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    k = rows_of(k, k_start, b, n, PADDED)
    v = rows_of(v, k_start, b, n, PADDED)
    first = tile * BLOCK_T
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = offs_t < q_len
    q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), first, mask_t, True, BLOCK_T, WIDTHS)
    dout_tile = load_rows(rows_of(dout, q_start, b, n, PADDED), first, mask_t, True, BLOCK_T, WIDTHS)
    lse2, delta_t = _row_numbers(
        numbers_of(lse, q_start, n, heads), numbers_of(delta, q_start, n, heads), offs_t, mask_t
    )
    position = q_offset + offs_t
    limit = tl.minimum(k_len, tl.maximum(prefix_len, position + 1))

    last = tl.minimum(first + BLOCK_T, q_len)
    end = tl.where(first < q_len, tl.minimum(k_len, tl.maximum(prefix_len, q_offset + last)), 0)
    full = tl.minimum(tl.minimum(k_len, tl.maximum(prefix_len, q_offset + first + 1)), end) // BLOCK_S * BLOCK_S
    scale2 = scale * LOG2E
    dq_tile = zeros(BLOCK_T, WIDTHS)
    biased = 0
    if GRID is not None:
        patches = tl.where(q_offset + first < image_len, tl.minimum(image_len, end), 0)
        biased = tl.cdiv(patches, BLOCK_S) * BLOCK_S
        table = head_table(table, n, GRID)
        both = tl.minimum(biased, full)
        dq_tile = _add_dq(
            dq_tile, 0, both, q_tile, dout_tile, lse2, delta_t, k, v, table, position, limit, k_len, image_len, scale2,
            True, False, GRID, WIDTHS, BLOCK_S, PRECISION,
        )  # fmt: skip
        dq_tile = _add_dq(
            dq_tile, both, biased, q_tile, dout_tile, lse2, delta_t, k, v, table, position, limit, k_len, image_len,
            scale2, True, True, GRID, WIDTHS, BLOCK_S, PRECISION,
        )  # fmt: skip
    dq_tile = _add_dq(
        dq_tile, biased, full, q_tile, dout_tile, lse2, delta_t, k, v, table, position, limit, k_len, image_len, scale2,
        False, False, GRID, WIDTHS, BLOCK_S, PRECISION,
    )  # fmt: skip
    dq_tile = _add_dq(
        dq_tile, tl.maximum(biased, full), end, q_tile, dout_tile, lse2, delta_t, k, v, table, position, limit, k_len,
        image_len, scale2, False, True, GRID, WIDTHS, BLOCK_S, PRECISION,
    )  # fmt: skip

    dq_tile = zero_where_not(mask_t, scaled(dq_tile, scale, WIDTHS), WIDTHS)
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
    lse,
    delta,
    table,
    offs_s,
    q_len,
    q_offset,
    prefix_len,
    image_len,
    scale2,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dk + Σ dsᵀ · q, dv + Σ pᵀ · dout) over the query tiles from `begin` to `end`."""
    dk_tile, dv_tile = sums
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < q_len
        position = q_offset + offs_t
        q_tile = load_rows(q, start, mask_t, True, BLOCK_T, WIDTHS)
        dout_tile = load_rows(dout, start, mask_t, True, BLOCK_T, WIDTHS)
        lse2, delta_t = _row_numbers(lse, delta, offs_t, mask_t)
        # Transposed, keys × queries, so that both sums below take their weights as they come out of the products.
        scores = products(k_tile, q_tile, WIDTHS, PRECISION) * scale2
        if BIASED:
            scores += bias2(table, position[None, :], offs_s[:, None], image_len, GRID)
        p = tl.exp2(scores - lse2[None, :])
        if MASKED:
            p = tl.where(offs_s[:, None] < tl.maximum(prefix_len, position + 1)[None, :], p, 0.0)
        dv_tile = add_mix(dv_tile, p, dout_tile, WIDTHS, PRECISION)
        dp = products(v_tile, dout_tile, WIDTHS, PRECISION)
        dk_tile = add_mix(dk_tile, p * (dp - delta_t[None, :]), q_tile, WIDTHS, PRECISION)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=["batch", "heads", "tiles", "rows"])
def dk_dv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
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
    """Writes dk and dv of one key tile, over the query tiles that see any of it: some only in part, then all of it."""
    tile, n, b = locate(tiles, heads)
    q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
    q = rows_of(q, q_start, b, n, PADDED)
    dout = rows_of(dout, q_start, b, n, PADDED)
    lse = numbers_of(lse, q_start, n, heads)
    delta = numbers_of(delta, q_start, n, heads)
    first = tile * BLOCK_S
    offs_s = first + tl.arange(0, BLOCK_S)
    mask_s = offs_s < k_len
    k_tile = load_rows(rows_of(k, k_start, b, n, PADDED), first, mask_s, True, BLOCK_S, WIDTHS)
    v_tile = load_rows(rows_of(v, k_start, b, n, PADDED), first, mask_s, True, BLOCK_S, WIDTHS)

    last = tl.minimum(first + BLOCK_S, k_len) - 1
    end = tl.where(first < k_len, q_len, 0)
    # Key j is seen by every query from j - q_offset on, and by all of them inside the prefix.
    some = tl.where(first < prefix_len, 0, tl.maximum(first - q_offset, 0)) // BLOCK_T * BLOCK_T
    full = tl.where(last < prefix_len, 0, tl.cdiv(tl.maximum(last - q_offset, 0), BLOCK_T) * BLOCK_T)
    scale2 = scale * LOG2E
    sums = zeros(BLOCK_S, WIDTHS), zeros(BLOCK_S, WIDTHS)
    biased = 0
    if GRID is not None:
        patches = tl.where(first < image_len, tl.minimum(tl.maximum(image_len - q_offset, 0), end), 0)
        biased = tl.cdiv(patches, BLOCK_T) * BLOCK_T
        table = head_table(table, n, GRID)
        sums = _add_dk_dv(
            sums, some, tl.minimum(biased, full), k_tile, v_tile, q, dout, lse, delta, table, offs_s, q_len, q_offset,
            prefix_len, image_len, scale2, True, True, GRID, WIDTHS, BLOCK_T, PRECISION,
        )  # fmt: skip
    sums = _add_dk_dv(
        sums, tl.maximum(some, biased), tl.minimum(full, end), k_tile, v_tile, q, dout, lse, delta, table, offs_s,
        q_len, q_offset, prefix_len, image_len, scale2, False, True, GRID, WIDTHS, BLOCK_T, PRECISION,
    )  # fmt: skip
    if GRID is not None:
        sums = _add_dk_dv(
            sums, full, biased, k_tile, v_tile, q, dout, lse, delta, table, offs_s, q_len, q_offset, prefix_len,
            image_len, scale2, True, False, GRID, WIDTHS, BLOCK_T, PRECISION,
        )  # fmt: skip
    sums = _add_dk_dv(
        sums, tl.maximum(full, biased), end, k_tile, v_tile, q, dout, lse, delta, table, offs_s, q_len, q_offset,
        prefix_len, image_len, scale2, False, False, GRID, WIDTHS, BLOCK_T, PRECISION,
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


@triton.jit(do_not_specialize=["batch", "heads", "tiles_p", "tiles_j", "begin", "end"])
def table_pairs_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    pairs,
    table,
    bounds,
    batch,
    heads,
    tiles_p,
    tiles_j,
    begin,
    end,
    scale,
    PADDED: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """pairs[n, p - begin, j] = Σ_b ds over the patches p from `begin` to `end` and all patches j."""
    program = tl.program_id(0)
    tile_p = program % tiles_p
    first = program // tiles_p % tiles_j * BLOCK_S
    n = program // tiles_p // tiles_j
    first_p = begin + tile_p * BLOCK_T
    position = first_p + tl.arange(0, BLOCK_T)
    offs_s = first + tl.arange(0, BLOCK_S)
    table = head_table(table, n, GRID)
    scale2 = scale * LOG2E
    total = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for b in range(batch):
        q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len = bounds_of(bounds, b, batch)
        offs_t = position - q_offset
        mask_t = (offs_t >= 0) & (offs_t < q_len) & (position < image_len)
        keys = tl.minimum(k_len, image_len)
        limit = tl.where(mask_t, tl.minimum(keys, tl.maximum(prefix_len, position + 1)), 0)
        if tl.max(limit, 0) > first:
            mask_s = offs_s < keys
            start = first_p - q_offset
            q_tile = load_rows(rows_of(q, q_start, b, n, PADDED), start, mask_t, True, BLOCK_T, WIDTHS)
            dout_tile = load_rows(rows_of(dout, q_start, b, n, PADDED), start, mask_t, True, BLOCK_T, WIDTHS)
            k_tile = load_rows(rows_of(k, k_start, b, n, PADDED), first, mask_s, True, BLOCK_S, WIDTHS)
            v_tile = load_rows(rows_of(v, k_start, b, n, PADDED), first, mask_s, True, BLOCK_S, WIDTHS)
            lse2, delta_t = _row_numbers(
                numbers_of(lse, q_start, n, heads), numbers_of(delta, q_start, n, heads), offs_t, mask_t
            )
            scores = products(q_tile, k_tile, WIDTHS, PRECISION) * scale2
            scores += bias2(table, position[:, None], offs_s[None, :], image_len, GRID)
            p = tl.where(offs_s[None, :] < limit[:, None], tl.exp2(scores - lse2[:, None]), 0.0)
            dp = products(dout_tile, v_tile, WIDTHS, PRECISION)
            total += p * (dp - delta_t[:, None])
    PATCHES: tl.constexpr = GRID[0] * GRID[1]
    row = n.to(tl.int64) * (end - begin) + (position - begin)
    mask = (position < end)[:, None] & (offs_s < PATCHES)[None, :]
    tl.store(pairs + row[:, None] * PATCHES + offs_s[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["begin", "end"])
def table_sum_kernel(
    pairs,
    dtable,
    begin,
    end,
    GRID: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds to one row of head n's dtable the pairs whose first patch lies in image rows `begin` … `end` - 1."""
    GH: tl.constexpr = GRID[0]
    GW: tl.constexpr = GRID[1]
    SPANS: tl.constexpr = 2 * GRID[0] - 1
    SPAN: tl.constexpr = 2 * GRID[1] - 1
    n = tl.program_id(0) // SPANS
    down = tl.program_id(0) % SPANS - (GH - 1)  # from the query's image row to the key's
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    right = columns - (GW - 1)
    pairs += n.to(tl.int64) * (end - begin) * GW * (GH * GW)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for row in range(tl.maximum(begin, -down), tl.minimum(end, GH - down)):
        for start in range(0, GW, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            key_c = c[:, None] + right[None, :]
            p = (row - begin) * GW + c
            offs = p.to(tl.int64)[:, None] * (GH * GW) + (row + down) * GW + key_c
            total += tl.load(pairs + offs, mask=(c < GW)[:, None] & (key_c >= 0) & (key_c < GW), other=0.0)
    target = dtable + n.to(tl.int64) * (SPANS * SPAN) + (tl.program_id(0) % SPANS) * SPAN + columns
    mask = columns < SPAN
    tl.store(target, tl.load(target, mask=mask, other=0.0) + tl.sum(total, 0), mask=mask)
