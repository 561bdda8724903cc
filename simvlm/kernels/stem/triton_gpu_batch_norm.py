"""The kernels of `batch_norm_act`'s halves: pixels by channels, a tile of both per step, sums in a fixed order.

A reduction is two launches: each program takes a chunk of pixels and a block of channels into one row of a scratch,
float32[parts, 2·C], and a second kernel merges the rows in order, in float64. A lane of the tile keeps its own running
mean and Σ (x - mean)² (Welford 1962), so nothing crosses threads until the chunk ends, where the lanes are merged by
the two-sample update of Chan, Golub and LeVeque (1983): exact where the mean is large beside the deviation.

An image tensor reaches a kernel as (pointer, strides of image, row and column); FLAT says that the column's stride
alone serves all pixels, in order. What is contiguous comes as a bare pointer.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pixels(x, p, height, width, FLAT: tl.constexpr):
    """Pointers to the first channel of pixels p, [BLOCK_P, 1]."""
    if FLAT:
        return (x[0] + p.to(tl.int64) * x[3])[:, None]
    else:
        row = p // width
        image = (row // height).to(tl.int64) * x[1]
        return (x[0] + image + (row % height).to(tl.int64) * x[2] + (p % width).to(tl.int64) * x[3])[:, None]


@triton.jit
def _contiguous(x, p, channels):
    return (x + p.to(tl.int64) * channels)[:, None]


@triton.jit
def _channels(x, offs_c, mask_c):
    """A float32 vector over channels, [1, BLOCK_C]."""
    return tl.load(x + offs_c, mask=mask_c, other=0.0)[None, :]


@triton.jit
def _rstd(var, offs_c, mask_c, eps):
    # Correctly rounded, once a channel: the approximate rsqrt would spend the budget of every pixel.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + offs_c, mask=mask_c, other=1.0) + eps))[None, :]


@triton.jit
def _scale_of(branch_scale, p, mask_p, image):
    """The branch scale of the image that each pixel is of, [BLOCK_P, 1]."""
    return tl.load(branch_scale + p // image, mask=mask_p, other=0.0)[:, None]


@triton.jit(do_not_specialize=["pixels", "height", "width", "chunk"])
def statistics_kernel(
    x,
    partial,
    pixels,
    channels,
    height,
    width,
    chunk,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Row `part` of partial: mean and Σ (x - mean)² of one chunk of pixels."""
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    begin = part * chunk
    end = tl.minimum(begin + chunk, pixels)
    lane = tl.arange(0, BLOCK_P)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    taken = 0.0
    for start in range(begin, end, BLOCK_P):
        p = start + lane
        mask_p = p < end
        mask = mask_p[:, None] & mask_c[None, :]
        value = tl.load(_pixels(x, p, height, width, FLAT) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        taken += 1.0
        away = value - mean
        moved = mean + away * (1.0 / taken)
        square = tl.where(mask_p[:, None], square + away * (value - moved), square)
        mean = tl.where(mask_p[:, None], moved, mean)
    # A lane has met every BLOCK_P-th pixel of the chunk.
    count = ((tl.maximum(end - begin - lane, 0) + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]
    whole = tl.sum(mean * count, 0) / (end - begin).to(tl.float32)
    gap = mean - whole[None, :]
    target = partial + part.to(tl.int64) * 2 * channels + offs_c
    tl.store(target, whole, mask=mask_c)
    tl.store(target + channels, tl.sum(square + count * gap * gap, 0), mask=mask_c)


@triton.jit(do_not_specialize=["parts", "pixels", "chunk"])
def merge_kernel(partial, mean, var, parts, pixels, channels, chunk, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """mean and var of all pixels from the rows that `statistics_kernel` left."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    summed = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for start in range(0, parts, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < parts)[:, None] & mask_c[None, :]
        count = tl.minimum(pixels - k * chunk, chunk)[:, None].to(tl.float64)
        row = partial + (k.to(tl.int64) * 2 * channels)[:, None] + offs_c[None, :]
        summed += tl.load(row, mask=mask, other=0.0).to(tl.float64) * count
    whole = tl.sum(summed, 0) / pixels.to(tl.float64)
    squares = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for start in range(0, parts, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < parts)[:, None] & mask_c[None, :]
        count = tl.minimum(pixels - k * chunk, chunk)[:, None].to(tl.float64)
        row = partial + (k.to(tl.int64) * 2 * channels)[:, None] + offs_c[None, :]
        gap = tl.load(row, mask=mask, other=0.0).to(tl.float64) - whole[None, :]
        square = tl.load(row + channels, mask=mask, other=0.0).to(tl.float64)
        squares += tl.where(mask, square + count * gap * gap, 0.0)
    tl.store(mean + offs_c, whole.to(tl.float32), mask=mask_c)
    tl.store(var + offs_c, (tl.sum(squares, 0) / pixels.to(tl.float64)).to(tl.float32), mask=mask_c)


@triton.jit(do_not_specialize=["parts"])
def sum_kernel(partial, total, parts, columns, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """float32[columns]: the sum of the rows of partial, float32[parts, columns], in order."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < columns
    summed = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for start in range(0, parts, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < parts)[:, None] & mask_c[None, :]
        row = partial + (k.to(tl.int64) * columns)[:, None] + offs_c[None, :]
        summed += tl.load(row, mask=mask, other=0.0).to(tl.float64)
    tl.store(total + offs_c, tl.sum(summed, 0).to(tl.float32), mask=mask_c)


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def apply_kernel(
    x,
    residual,
    y,
    mean,
    var,
    weight,
    bias,
    branch_scale,
    eps,
    pixels,
    channels,
    height,
    width,
    RELU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act(branch_scale · ((x - mean) · weight · rstd + bias) + residual) of one tile."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < pixels, offs_c < channels
    mask = mask_p[:, None] & mask_c[None, :]
    value = tl.load(_pixels(x, p, height, width, FLAT) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    gain = _channels(weight, offs_c, mask_c) * _rstd(var, offs_c, mask_c, eps)
    z = (value - _channels(mean, offs_c, mask_c)) * gain + _channels(bias, offs_c, mask_c)
    if branch_scale is not None:
        z = z * _scale_of(branch_scale, p, mask_p, height * width)
    if residual is not None:
        z += tl.load(_pixels(residual, p, height, width, FLAT) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z < 0, 0.0, z)  # not a maximum: NaN stays visible
    tl.store(_contiguous(y, p, channels) + offs_c[None, :], z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "height", "width", "chunk"])
def reductions_kernel(
    dy,
    x,
    y,
    dresidual,
    partial,
    mean,
    var,
    weight,
    bias,
    branch_scale,
    eps,
    pixels,
    channels,
    height,
    width,
    chunk,
    RELU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Row `part` of partial: Σ dz and Σ dz·norm over one chunk of pixels; with y, dresidual = dy · [y > 0] too."""
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    begin = part * chunk
    end = tl.minimum(begin + chunk, pixels)
    middle, rstd = _channels(mean, offs_c, mask_c), _rstd(var, offs_c, mask_c, eps)
    gain, shift = _channels(weight, offs_c, mask_c) * rstd, _channels(bias, offs_c, mask_c)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < end
        mask = mask_p[:, None] & mask_c[None, :]
        value = tl.load(_pixels(x, p, height, width, FLAT) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(_contiguous(dy, p, channels) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        away = value - middle
        if branch_scale is not None:
            scale = _scale_of(branch_scale, p, mask_p, height * width)
        if y is not None:
            live = tl.load(_contiguous(y, p, channels) + offs_c[None, :], mask=mask, other=0.0) > 0
            dz = tl.where(live, dz, 0.0)
            tl.store(
                _contiguous(dresidual, p, channels) + offs_c[None, :], dz.to(dresidual.dtype.element_ty), mask=mask
            )
        elif RELU:
            z = away * gain + shift
            if branch_scale is not None:
                z = z * scale
            dz = tl.where(z > 0, dz, 0.0)
        if branch_scale is not None:
            dz = dz * scale
        dz = tl.where(mask, dz, 0.0)
        sums += dz
        products += tl.where(mask, dz * (away * rstd), 0.0)
    target = partial + part.to(tl.int64) * 2 * channels + offs_c
    tl.store(target, tl.sum(sums, 0), mask=mask_c)
    tl.store(target + channels, tl.sum(products, 0), mask=mask_c)


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def backward_apply_kernel(
    dy,
    x,
    dx,
    mean,
    var,
    weight,
    bias,
    branch_scale,
    mean_dz,
    mean_dz_norm,
    eps,
    pixels,
    channels,
    height,
    width,
    RELU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = weight · rstd · (dz - mean_dz - norm · mean_dz_norm) of one tile; without the means, weight · rstd · dz."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < pixels, offs_c < channels
    mask = mask_p[:, None] & mask_c[None, :]
    rstd = _rstd(var, offs_c, mask_c, eps)
    gain = _channels(weight, offs_c, mask_c) * rstd
    dz = tl.load(_contiguous(dy, p, channels) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU or mean_dz is not None:
        value = tl.load(_pixels(x, p, height, width, FLAT) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        away = value - _channels(mean, offs_c, mask_c)
    if branch_scale is not None:
        scale = _scale_of(branch_scale, p, mask_p, height * width)
    if RELU:
        z = away * gain + _channels(bias, offs_c, mask_c)
        if branch_scale is not None:
            z = z * scale
        dz = tl.where(z > 0, dz, 0.0)
    if branch_scale is not None:
        dz = dz * scale
    if mean_dz is not None:
        dz = dz - _channels(mean_dz, offs_c, mask_c) - away * rstd * _channels(mean_dz_norm, offs_c, mask_c)
    tl.store(_contiguous(dx, p, channels) + offs_c[None, :], (gain * dz).to(dx.dtype.element_ty), mask=mask)
