"""The kernels of `embed_sequence`: who belongs where is looked up on the device, in `places`; no index is stored.

A patch (a text row) finds its sequence by bisecting the running counts in `places`, a storage row by bisecting the
starts. The projection is one matrix product over all patches, forward and for dfeatures, whose rows are read or written
in their place: no gathered copy. Parameter gradients are sums in the order of the sequences or of chunks of patches.

The pointer to `places`, int32[5, B], comes with B and its bits in a tuple to the functions here; features reach
a kernel as (pointer, strides of image, row and column, Gh, Gw).
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_AT_ONCE = tl.constexpr(32)
"""Sequences whose rows are summed before the sum is added to the others': a chain of thousands would lose digits."""


@triton.jit
def _owner(keys, batch, bits, wanted):
    """The last b with keys[b] <= wanted, for ascending keys, or -1."""
    count = wanted * 0
    step = tl.full([], 1, tl.int32) << bits
    for _ in range(bits):
        step = step // 2
        reached = tl.minimum(count + step, batch)
        key = tl.load(keys + reached - 1)
        count = tl.where(key <= wanted, tl.maximum(reached, count), count)
    return count - 1


@triton.jit
def _place(places, b, i, begin, end, rows):
    """(storage row of position i of sequence b, whether it is one), for begin <= i < end within the sequence."""
    pointer, batch, _ = places
    known = b >= 0
    row = tl.load(pointer + b, mask=known, other=0) + i
    following = tl.load(pointer + b + 1, mask=known & (b + 1 < batch), other=2147483647)
    inside = (i >= begin) & (i < end) & (i < tl.load(pointer + batch + b, mask=known, other=0))
    return row, known & inside & (row < tl.minimum(following, rows))


@triton.jit
def _row_of_patch(places, patch, patches, grid, rows):
    pointer, batch, bits = places
    b = _owner(pointer + 3 * batch, batch, bits, patch // grid)
    image_len = tl.load(pointer + 2 * batch + b, mask=b >= 0, other=0)
    # Sequences without an image have an index too, that of the next image: their image_len of 0 takes nothing.
    first = tl.load(pointer + 3 * batch + b, mask=b >= 0, other=-1)
    row, there = _place(places, b, patch % grid, 0, image_len, rows)
    return row, there & (patch < patches) & (patch // grid == first)


@triton.jit
def _row_of_text(places, t, text_rows, rows):
    pointer, batch, bits = places
    b = _owner(pointer + 4 * batch, batch, bits, t)
    image_len = tl.load(pointer + 2 * batch + b, mask=b >= 0, other=0)
    i = image_len + t - tl.load(pointer + 4 * batch + b, mask=b >= 0, other=0)
    row, there = _place(places, b, i, image_len, 2147483647, rows)
    return row, there & (t < text_rows)


@triton.jit
def _patch_rows(x, patch):
    """Pointers to the first channel of each patch."""
    pointer, stride_b, stride_h, stride_w, height, width = x
    i = patch % (height * width)
    image = (patch // (height * width)).to(tl.int64) * stride_b
    return pointer + image + (i // width).to(tl.int64) * stride_h + (i % width).to(tl.int64) * stride_w


@triton.jit(do_not_specialize=["batch", "bits", "rows", "text_rows", "patches"])
def place_kernel(
    text,
    stride_t,
    features,
    bias,
    positions,
    out,
    places,
    batch,
    bits,
    rows,
    text_rows,
    patches,
    width,
    IDENTITY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Storage rows that hold text, or nothing; with IDENTITY patches too, else `project_kernel` writes those."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (d < width)[None, :]
    b = _owner(places, batch, bits, r)
    known = (b >= 0) & (r < rows)
    i = r - tl.load(places + b, mask=known, other=0)
    owned = known & (i < tl.load(places + batch + b, mask=known, other=0))
    image_len = tl.load(places + 2 * batch + b, mask=known, other=0)
    t = tl.load(places + 4 * batch + b, mask=known, other=0) + i - image_len
    is_text = owned & (i >= image_len) & (t < text_rows)
    source = (text + t.to(tl.int64) * stride_t)[:, None] + d[None, :]
    value = tl.load(source, mask=is_text[:, None] & mask_d, other=0.0)
    writes = r < rows
    if features is not None:
        grid = features[4] * features[5]
        patch = tl.load(places + 3 * batch + b, mask=known, other=0) * grid + i
        is_patch = owned & (i < image_len) & (patch < patches)
        if IDENTITY:
            mask = is_patch[:, None] & mask_d
            z = tl.load(_patch_rows(features, patch)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + d, mask=d < width, other=0.0)[None, :]
            z += tl.load(positions + (i.to(tl.int64) * width)[:, None] + d[None, :], mask=mask, other=0.0)
            value = tl.where(is_patch[:, None], z.to(value.dtype), value)
        else:
            writes = writes & (is_patch == 0)
    tl.store(out + (r.to(tl.int64) * width)[:, None] + d[None, :], value, mask=writes[:, None] & mask_d)


@triton.jit(do_not_specialize=["batch", "bits", "rows", "patches"])
def project_kernel(
    features,
    storage,
    weight,
    stride_wn,
    stride_wk,
    bias,
    positions,
    places,
    batch,
    bits,
    rows,
    patches,
    depth,
    width,
    FORWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Patches times weight: FORWARD from features, with bias and position, into storage rows; else the way back.

    The product is [patches, depth] · [depth, width] with weight[k, n] at n · stride_wn + k · stride_wk.
    """
    columns = tl.cdiv(width, BLOCK_N)
    patch = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    grid = features[4] * features[5]
    row, owned = _row_of_patch((places, batch, bits), patch, patches, grid, rows)
    if FORWARD:
        source, target, writes = _patch_rows(features, patch), storage + row.to(tl.int64) * width, owned
    else:
        source, target = storage + row.to(tl.int64) * depth, _patch_rows(features, patch)
        writes = patch < patches
    k = tl.arange(0, BLOCK_K)
    left = source[:, None] + k[None, :]
    right = weight + k.to(tl.int64)[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        mask_k = k < depth - start
        a = tl.load(left, mask=owned[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(right, mask=mask_k[:, None] & (n < width)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += tl.cast(stride_wk, tl.int64) * BLOCK_K
    mask = writes[:, None] & (n < width)[None, :]
    if FORWARD:
        if bias is not None:
            total += tl.load(bias + n, mask=n < width, other=0.0)[None, :]
        i = (patch % grid).to(tl.int64) * width
        total += tl.load(positions + i[:, None] + n[None, :], mask=mask, other=0.0)
        tl.store(target[:, None] + n[None, :], total.to(storage.dtype.element_ty), mask=mask)
    else:
        tl.store(target[:, None] + n[None, :], total.to(storage.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "bits", "rows", "patches", "chunk"])
def weight_kernel(
    features,
    drows,
    partial,
    places,
    batch,
    bits,
    rows,
    patches,
    channels,
    width,
    chunk,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """float32[parts, D, C]: Σ drows · featuresᵀ over one chunk of patches, without those of nobody: they may be NaN."""
    columns = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(1)
    d = tl.program_id(0) // columns * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    grid = features[4] * features[5]
    begin = part * chunk
    end = tl.minimum(begin + chunk, patches)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_M):
        patch = start + tl.arange(0, BLOCK_M)
        row, owned = _row_of_patch((places, batch, bits), patch, end, grid, rows)
        left = (drows + row.to(tl.int64) * width)[:, None] + d[None, :]
        a = tl.load(left, mask=owned[:, None] & (d < width)[None, :], other=0.0)
        right = _patch_rows(features, patch)[:, None] + c[None, :]
        b = tl.load(right, mask=owned[:, None] & (c < channels)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    target = partial + (part.to(tl.int64) * width + d)[:, None] * channels + c[None, :]
    tl.store(target, total, mask=(d < width)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=["batch", "bits", "rows", "count"])
def gather_kernel(
    drows,
    out,
    places,
    batch,
    bits,
    rows,
    count,
    grid,
    width,
    TEXT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of each text row (TEXT) or patch: its storage row's, or 0 where nobody asks for it."""
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if TEXT:
        row, owned = _row_of_text((places, batch, bits), index, count, rows)
    else:
        row, owned = _row_of_patch((places, batch, bits), index, count, grid, rows)
    mask_d = (d < width)[None, :]
    value = tl.load((drows + row.to(tl.int64) * width)[:, None] + d[None, :], mask=owned[:, None] & mask_d, other=0.0)
    target = (out + index.to(tl.int64) * width)[:, None] + d[None, :]
    tl.store(target, value, mask=(index < count)[:, None] & mask_d)


@triton.jit(do_not_specialize=["batch", "bits", "rows", "images"])
def positions_kernel(
    drows,
    dpositions,
    places,
    batch,
    bits,
    rows,
    images,
    grid,
    width,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """float32[I, D]: the gradient of each position, summed over the images in order."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (d < width)[None, :]
    total = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for first in range(0, batch, _AT_ONCE):
        some = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
        for b in range(first, tl.minimum(first + _AT_ONCE, batch)):
            image_len = tl.load(places + 2 * batch + b)
            wanted = (tl.load(places + 3 * batch + b) < images) & (i < grid)
            row, there = _place((places, batch, bits), i * 0 + b, i, 0, image_len, rows)
            mask = (there & wanted)[:, None] & mask_d
            value = tl.load((drows + row.to(tl.int64) * width)[:, None] + d[None, :], mask=mask, other=0.0)
            some += value.to(tl.float32)
        total += some
    tl.store(dpositions + (i.to(tl.int64) * width)[:, None] + d[None, :], total, mask=(i < grid)[:, None] & mask_d)
