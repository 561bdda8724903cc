"""The relative-position table in the Triton kernels: as the bias of a tile of scores, and its gradient.

To gather the table per element costs instructions that nothing hides. So where every sequence begins at position 0,
the table is expanded once a call into tiles of patches × patches, which all sequences share. A tile's numbers lie
in the order in which a matrix product's sums lie in registers: each thread loads its own, 16 bytes at a time, and
nothing moves between threads. Where the expanded table would be too large, or sequences begin elsewhere, it is
gathered.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from simvlm.kernels.attention.triton_gpu_tiles import (
    LOG2E,
    bounds_of,
    numbers_of,
    products,
    row_numbers,
    rows_of,
    stream_rows,
)


@triton.jit
def _flat(x, GRID: tl.constexpr):
    """Entry (position p, key j) of one head's flattened table is number flat(j) - flat(p) + centre."""
    return x // GRID[1] * (2 * GRID[1] - 1) + x % GRID[1]


@triton.jit
def _entries(table, position, key, image_len, GRID: tl.constexpr):
    """One head's table at `position` × `key`, which broadcast; 0 where either is no patch."""
    CENTRE: tl.constexpr = (GRID[0] - 1) * (2 * GRID[1] - 1) + GRID[1] - 1
    inside = (position < image_len) & (key < image_len)
    return tl.load(table + (_flat(key, GRID) - _flat(position, GRID) + CENTRE), mask=inside, other=0.0)


@triton.jit
def head_table(table, n, FORM: tl.constexpr, GRID: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """Head n's table, in the form that the kernel reads."""
    if FORM == "expanded":
        PATCHES: tl.constexpr = GRID[0] * GRID[1]
        TILES: tl.constexpr = tl.cdiv(PATCHES, BLOCK_ROW) * tl.cdiv(PATCHES, BLOCK_COL)
        return table + n.to(tl.int64) * (TILES * BLOCK_ROW * BLOCK_COL)
    else:
        return table + n.to(tl.int64) * ((2 * GRID[0] - 1) * (2 * GRID[1] - 1))


# An expanded tile [BLOCK_ROW, BLOCK_COL] lies in the order of the sums of mma and wgmma: a thread holds, of 8 columns,
# 2 neighbours in each of 2 rows that are 8 apart: 16 bytes of float32; 32 lanes cover 16 rows × 8 columns; warps cover
# the rows, 16 each, and parts of the columns if there are more. Should the compiler order registers otherwise, the
# numbers are the same, by way of shared memory.


@triton.jit(do_not_specialize=["inverse"])
def expand_kernel(
    table,
    expanded,
    inverse,
    GRID: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One tile of one head: the table times `inverse`, positions × keys, or keys × positions if TRANSPOSED."""
    PATCHES: tl.constexpr = GRID[0] * GRID[1]
    COLS: tl.constexpr = tl.cdiv(PATCHES, BLOCK_COL)
    SIZE: tl.constexpr = BLOCK_ROW * BLOCK_COL
    ROW_WARPS: tl.constexpr = min(WARPS, BLOCK_ROW // 16)
    COL_WARPS: tl.constexpr = WARPS // ROW_WARPS
    PARTS: tl.constexpr = BLOCK_COL // (8 * COL_WARPS)
    tile, n = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, SIZE)
    lane, warp, part = i // 4 % 32, i // 128 % WARPS, i // (128 * WARPS)
    row = part // PARTS * (16 * ROW_WARPS) + warp % ROW_WARPS * 16 + i // 2 % 2 * 8 + lane // 4
    col = warp // ROW_WARPS * (BLOCK_COL // COL_WARPS) + part % PARTS * 8 + lane % 4 * 2 + i % 2
    row += tile // COLS * BLOCK_ROW
    col += tile % COLS * BLOCK_COL
    source = head_table(table, n, "gathered", GRID, BLOCK_ROW, BLOCK_COL)
    target = head_table(expanded, n, "expanded", GRID, BLOCK_ROW, BLOCK_COL) + tile * SIZE + i
    if TRANSPOSED:
        tl.store(target, _entries(source, col, row, PATCHES, GRID) * inverse)
    else:
        tl.store(target, _entries(source, row, col, PATCHES, GRID) * inverse)


@triton.jit
def _expanded_tile(
    expanded,
    row_tile,
    col_tile,
    GRID: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Tile (row_tile, col_tile) of one head's expanded table, [BLOCK_ROW, BLOCK_COL]."""
    COLS: tl.constexpr = tl.cdiv(GRID[0] * GRID[1], BLOCK_COL)
    SIZE: tl.constexpr = BLOCK_ROW * BLOCK_COL
    ROW_WARPS: tl.constexpr = min(WARPS, BLOCK_ROW // 16)
    COL_WARPS: tl.constexpr = WARPS // ROW_WARPS
    REPEATS: tl.constexpr = BLOCK_ROW // (16 * ROW_WARPS)
    PARTS: tl.constexpr = BLOCK_COL // (8 * COL_WARPS)
    inside = (
        tl.arange(0, SIZE // (WARPS * 128))[:, None, None] * (WARPS * 128)
        + tl.arange(0, WARPS * 32)[None, :, None] * 4
        + tl.arange(0, 4)[None, None, :]
    )
    numbers = tl.load(expanded + (row_tile * COLS + col_tile) * SIZE + inside)
    numbers = tl.reshape(numbers, [REPEATS, PARTS, COL_WARPS, ROW_WARPS, 8, 4, 2, 2])
    numbers = tl.permute(numbers, [0, 3, 6, 4, 2, 1, 5, 7])
    return tl.reshape(numbers, [BLOCK_ROW, BLOCK_COL])


@triton.jit
def biased_products(
    a,
    b,
    table,
    row_tile,
    col_tile,
    position,
    key,
    image_len,
    inverse,
    TRANSPOSED: tl.constexpr,
    FORM: tl.constexpr,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<a_i, b_j> plus the table times `inverse`; a's rows are queries and b's keys, or the reverse if TRANSPOSED.

    `position` and `key` are the queries' and keys' positions; (row_tile, col_tile) is their tile of the expanded table.
    """
    if FORM == "expanded":
        bias = _expanded_tile(table, row_tile, col_tile, GRID, BLOCK_ROW, BLOCK_COL, WARPS)
    elif TRANSPOSED:
        bias = _entries(table, position[None, :], key[:, None], image_len, GRID) * inverse
    else:
        bias = _entries(table, position[:, None], key[None, :], image_len, GRID) * inverse
    if PRECISION == "ieee":
        return products(a, b, bias, WIDTHS, PRECISION)
    else:  # float32 sums that begin with the bias would round every product at the bias's size
        return products(a, b, None, WIDTHS, PRECISION) + bias


@triton.jit
def _first_with_image(bounds, begin, end, batch, BLOCK: tl.constexpr):
    """The first of the sequences from `begin` to `end` that has queries, keys and an image; `end` where none has."""
    found = end
    for start in range(begin, end, BLOCK):
        b = start + tl.arange(0, BLOCK)
        inside = b < end
        q_len = tl.load(bounds + batch + b, mask=inside, other=0)
        k_len = tl.load(bounds + 3 * batch + b, mask=inside, other=0)
        image_len = tl.load(bounds + 6 * batch + b, mask=inside, other=0)
        found = tl.minimum(found, tl.min(tl.where((q_len > 0) & (k_len > 0) & (image_len > 0), b, end), 0))
    return found


@triton.jit(
    do_not_specialize=[
        "batch",
        "heads",
        "tiles_p",
        "tiles_j",
        "begin",
        "end",
        "total",
        "at_once",
        "scale",
        "inverse",
    ]
)
def table_pairs_kernel(
    q,
    k,
    v,
    dout,
    lse2,
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
    total,
    at_once,
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
    """pairs[part, n, p - begin, j] = Σ_b ds over the patches p from `begin` to `end` and all patches j.

    A part of the batch is `at_once` sequences, b among them.
    """
    PATCHES: tl.constexpr = GRID[0] * GRID[1]
    program, part = tl.program_id(0), tl.program_id(1)
    tile_p = program % tiles_p
    tile_j = program // tiles_p % tiles_j
    first = tile_j * BLOCK_S
    n = program // tiles_p // tiles_j
    first_p = begin + tile_p * BLOCK_T
    position = first_p + tl.arange(0, BLOCK_T)
    offs_s = first + tl.arange(0, BLOCK_S)
    table = head_table(table, n, FORM, GRID, BLOCK_T, BLOCK_S)
    scale2 = scale * LOG2E
    sums = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    last = tl.minimum(batch, (part + 1) * at_once)
    with_image = _first_with_image(bounds, part * at_once, last, batch, 128)
    for each in range(with_image, last):
        # A branch would end the overlap of loads: who has nothing here reads what another has, and it weighs nothing.
        rows = tl.minimum(tl.load(bounds + batch + each), tl.load(bounds + 3 * batch + each))
        image_len = tl.where(rows > 0, tl.load(bounds + 6 * batch + each), 0)
        b = tl.where(image_len > 0, each, with_image)
        q_start, q_len, k_start, k_len, prefix_len, q_offset, _ = bounds_of(bounds, b, batch)
        if FORM == "expanded":
            q_offset = 0
        offs_t = position - q_offset
        mask_t = (offs_t >= 0) & (offs_t < q_len) & (position < image_len)
        limit = tl.where(mask_t, tl.minimum(tl.minimum(k_len, image_len), tl.maximum(prefix_len, position + 1)), 0)
        # Rows that are not there are the sequence's nearest ones, so that no row lies far from the tile's first.
        start_t, start_s = first_p - q_offset, tl.minimum(first, k_len - 1)
        rows_t, rows_s = tl.minimum(offs_t, q_len - 1), tl.minimum(offs_s, k_len - 1) - start_s
        if FORM != "expanded":
            start_t, rows_t = tl.maximum(start_t, 0), tl.maximum(rows_t, 0)
        start_t = tl.minimum(start_t, q_len - 1)
        rows_t -= start_t
        q_tile = stream_rows(rows_of(q, q_start, b, n, PADDED), start_t, rows_t, WIDTHS)
        dout_tile = stream_rows(rows_of(dout, q_start, b, n, PADDED), start_t, rows_t, WIDTHS)
        k_tile = stream_rows(rows_of(k, k_start, b, n, PADDED), start_s, rows_s, WIDTHS)
        v_tile = stream_rows(rows_of(v, k_start, b, n, PADDED), start_s, rows_s, WIDTHS)
        lse2_t, delta_t = row_numbers(
            numbers_of(lse2, q_start, n, total), numbers_of(delta, q_start, n, total), offs_t, mask_t
        )
        scores = biased_products(
            q_tile, k_tile, table, tile_p, tile_j, position, offs_s, image_len, inverse,
            False, FORM, GRID, WIDTHS, BLOCK_T, BLOCK_S, WARPS, PRECISION,
        )  # fmt: skip
        seen = tl.arange(0, BLOCK_S)[None, :] < (limit - first)[:, None]
        p = tl.where(seen, tl.exp2(scores * scale2 - lse2_t[:, None]), 0.0)
        dp = products(dout_tile, v_tile, None, WIDTHS, PRECISION)
        sums += p * (dp - delta_t[:, None])
    row = (part.to(tl.int64) * heads + n) * (end - begin) + (position - begin)
    mask = (position < end)[:, None] & (offs_s < PATCHES)[None, :]
    tl.store(pairs + row[:, None] * PATCHES + offs_s[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["begin", "end", "parts", "heads"])
def table_sum_kernel(
    pairs,
    dtable,
    begin,
    end,
    parts,
    heads,
    GRID: tl.constexpr,
    BLOCK_Z: tl.constexpr,
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
    right = (columns - (GW - 1))[None, None, :]
    total = tl.zeros([BLOCK_Z, BLOCK_C, BLOCK_D], tl.float32)
    for row in range(tl.maximum(begin, -down), tl.minimum(end, GH - down)):
        for start in range(0, GW, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)[None, :, None]
            key_c = c + right
            patch = (row - begin) * GW + c
            inside = (c < GW) & (key_c >= 0) & (key_c < GW)
            for some in range(0, parts, BLOCK_Z):
                part = some + tl.arange(0, BLOCK_Z)[:, None, None]
                of_part = (part.to(tl.int64) * heads + n) * ((end - begin) * GW)
                offs = (of_part + patch) * (GH * GW) + (row + down) * GW + key_c
                total += tl.load(pairs + offs, mask=inside & (part < parts), other=0.0)
    target = dtable + n.to(tl.int64) * (SPANS * SPAN) + (tl.program_id(0) % SPANS) * SPAN + columns
    mask = columns < SPAN
    tl.store(target, tl.load(target, mask=mask, other=0.0) + tl.sum(tl.sum(total, 0), 0), mask=mask)
