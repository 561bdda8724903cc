"""The stem's ops in Triton, for NVIDIA GPUs of compute capability 8.0 and up: refusals, choices and launches.

`batch_norm_act` is docs/stem.md's four halves, each one pass over its images, [C] vectors apart: the two that reduce
leave a row of float32 per chunk of pixels, which a second kernel merges in order. `embed_sequence` is one matrix
product over all patches whose epilogue adds bias and position and stores each row in its place; text is copied to its
own. The way back is written here too, not left to a library: a product with rows gathered in place needs no copy of
them, and the weight's gradient stays float32 and leaves out patches that are NaN. Sums are float32, across chunks
float64; float32 products run on tensor cores as three of TF32. Nothing is summed by atomics and chunks depend on shapes
alone: the same bits every time.

The kernels are in `triton_gpu_batch_norm.py` and `triton_gpu_embed.py`; Triton is imported when the first call runs,
because that takes half a second. With TRITON_INTERPRET=1 they run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from simvlm.kernels import triton_device
from simvlm.kernels.stem.places import rows_shape

_MOST = 2**30
"""Pixels, patches and rows: the kernels count them with 32-bit numbers, and go past the last by less than a tile."""

_PROGRAMS = 1024
"""Of a reduction, at the most: some for every multiprocessor of the largest GPU, few enough to merge in no time."""

_CHUNK = 4096
"""Patches whose products one program of the weight's gradient sums."""


def unavailable() -> str | None:
    return triton_device.unavailable()


def batch_norm_unsupported(x: Tensor) -> str | None:
    if (reason := triton_device.unsupported("x", x)) is not None:
        return reason
    pixels = math.prod(x.shape[:3])
    return None if pixels <= _MOST else f"x must have at most {_MOST} pixels, got {pixels}"


def embed_unsupported(text: Tensor, weight: Tensor | None) -> str | None:
    if (reason := triton_device.unsupported("text", text)) is not None:
        return reason
    rows = math.prod(text.shape[:-1])
    return None if rows <= _MOST else f"text must have at most {_MOST} rows, got {rows}"


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (mean, var) of [C]."""
    from simvlm.kernels.stem import triton_gpu_batch_norm as kernels

    channels, pixels = x.shape[-1], math.prod(x.shape[:3])
    mean, var = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean.zero_(), var.zero_()
    blocks = _blocks(channels, 2048)
    parts, chunk = _parts(pixels, channels, blocks)
    partial = torch.empty(parts, 2 * channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.statistics_kernel[(parts, _cdiv(channels, blocks["BLOCK_C"]))](
            _strided(x), partial, pixels, channels, x.shape[1], x.shape[2], chunk, FLAT=_flat(x), **blocks, num_warps=4
        )
        kernels.merge_kernel[(_cdiv(channels, 16),)](
            partial, mean, var, parts, pixels, channels, chunk, BLOCK_K=64, BLOCK_C=16
        )
    return mean, var


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """y, contiguous, in x's dtype."""
    from simvlm.kernels.stem import triton_gpu_batch_norm as kernels

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    grid, blocks = _tiles(x)
    flat = _flat(x) and (residual is None or _flat(residual))
    with torch.cuda.device_of(x):
        kernels.apply_kernel[grid](
            _strided(x), None if residual is None else _strided(residual), y, mean, var, weight, bias, branch_scale,
            eps, *_sizes(x), RELU=act == "relu", FLAT=flat, **blocks,
        )  # fmt: skip
    return y


def batch_norm_backward_reductions(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Σ dz, Σ dz·norm, dresidual or None)."""
    from simvlm.kernels.stem import triton_gpu_batch_norm as kernels

    pixels, channels = math.prod(x.shape[:3]), x.shape[-1]
    sums = torch.empty(2 * channels, dtype=torch.float32, device=x.device)
    dresidual = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return *_halves(sums.zero_()), dresidual
    blocks = _blocks(channels, 2048)
    parts, chunk = _parts(pixels, channels, blocks)
    partial = torch.empty(parts, 2 * channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.reductions_kernel[(parts, _cdiv(channels, blocks["BLOCK_C"]))](
            dy, _strided(x), y, dresidual, partial, mean, var, weight, bias, branch_scale,
            eps, *_sizes(x), chunk, RELU=act == "relu", FLAT=_flat(x), **blocks, num_warps=4,
        )  # fmt: skip
        _sum_rows(partial, sums)
    return *_halves(sums), dresidual


def batch_norm_backward_apply(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    mean_dz: Tensor | None,
    mean_dz_norm: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """dx, contiguous, in x's dtype."""
    from simvlm.kernels.stem import triton_gpu_batch_norm as kernels

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx
    grid, blocks = _tiles(x)
    with torch.cuda.device_of(x):
        kernels.backward_apply_kernel[grid](
            dy, _strided(x), dx, mean, var, weight, bias, branch_scale, mean_dz, mean_dz_norm,
            eps, *_sizes(x), RELU=act == "relu", FLAT=_flat(x), **blocks,
        )  # fmt: skip
    return dx


def embed_sequence(
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    image_positions: Tensor | None,
    text: Tensor,
    places: Tensor,
    query_len: int | None,
) -> Tensor:
    """rows, contiguous, in text's dtype; every row is written once."""
    from simvlm.kernels.stem import triton_gpu_embed as kernels

    text_rows, width = text.shape
    image_shape = None if features is None else tuple(features.shape)
    shape = rows_shape(image_shape, text_rows, width, places.shape[1], query_len)
    out = torch.empty(shape, dtype=text.dtype, device=text.device)
    if out.numel() == 0:
        return out
    rows, patches = out.numel() // width, _patches(image_shape)
    looked_up = _looked_up(places)
    with torch.cuda.device_of(text):
        kernels.place_kernel[(_cdiv(rows, 16), _cdiv(width, 128))](
            text, text.stride(0), None if features is None else _grid(features), bias, image_positions, out,
            *looked_up, rows, text_rows, patches, width, IDENTITY=weight is None, BLOCK_R=16, BLOCK_D=128,
        )  # fmt: skip
        if features is not None and weight is not None and patches > 0:
            channels, blocks = features.shape[3], _product_blocks(features, width, features.shape[3])
            kernels.project_kernel[(_cdiv(patches, blocks["BLOCK_M"]) * _cdiv(width, blocks["BLOCK_N"]),)](
                _grid(features), out, weight, weight.stride(0), weight.stride(1), bias, image_positions,
                *looked_up, rows, patches, channels, width, FORWARD=True, **blocks,
            )  # fmt: skip
    return out


def embed_sequence_backward(
    drows: Tensor,
    features: Tensor | None,
    weight: Tensor | None,
    places: Tensor,
    image_shape: tuple[int, ...] | None,
    text_rows: int,
    query_len: int | None,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """(dfeatures, dweight, dbias, dimage_positions, dtext), None where not wanted; parameters' in float32."""
    from simvlm.kernels.stem import triton_gpu_embed as kernels

    width, looked_up = drows.shape[-1], _looked_up(places)
    rows = drows.numel() // max(width, 1)
    patches = _patches(image_shape)
    dfeatures = dweight = dbias = dpositions = None
    dtext = torch.empty(text_rows, width, dtype=drows.dtype, device=drows.device) if wanted[4] else None
    with torch.cuda.device_of(drows):
        if dtext is not None and dtext.numel() > 0:
            kernels.gather_kernel[(_cdiv(text_rows, 16), _cdiv(width, 128))](
                drows, dtext, *looked_up, rows, text_rows, 1, width, TEXT=True, BLOCK_R=16, BLOCK_D=128
            )
        if image_shape is not None and wanted[0]:
            dfeatures = torch.empty(image_shape, dtype=drows.dtype, device=drows.device)
            if dfeatures.numel() > 0:
                _launch_dfeatures(kernels, drows, weight, looked_up, rows, dfeatures)
        if features is not None and weight is not None and wanted[1]:
            dweight = torch.empty(width, features.shape[3], dtype=torch.float32, device=drows.device)
            if patches == 0 or dweight.numel() == 0:
                dweight.zero_()
            else:
                _launch_dweight(kernels, drows, features, looked_up, rows, dweight)
        if image_shape is not None and (wanted[2] or wanted[3]):
            grid = image_shape[1] * image_shape[2]
            dpositions = torch.empty(grid, width, dtype=torch.float32, device=drows.device)
            if dpositions.numel() > 0:
                kernels.positions_kernel[(_cdiv(grid, 8), _cdiv(width, 128))](
                    drows, dpositions, *looked_up, rows, image_shape[0], grid, width, BLOCK_I=8, BLOCK_D=128
                )
            if wanted[2]:
                dbias = torch.zeros(width, dtype=torch.float32, device=drows.device)
                if dpositions.numel() > 0:
                    _sum_rows(dpositions, dbias)
    return dfeatures, dweight, dbias, dpositions if wanted[3] else None, dtext


def _launch_dfeatures(
    kernels: Any, drows: Tensor, weight: Tensor | None, looked_up: tuple[Any, ...], rows: int, dfeatures: Tensor
) -> None:
    width, channels, patches = drows.shape[-1], dfeatures.shape[3], _patches(dfeatures.shape)
    if weight is None:
        grid = dfeatures.shape[1] * dfeatures.shape[2]
        kernels.gather_kernel[(_cdiv(patches, 16), _cdiv(width, 128))](
            drows, dfeatures, *looked_up, rows, patches, grid, width, TEXT=False, BLOCK_R=16, BLOCK_D=128
        )
        return
    blocks = _product_blocks(dfeatures, channels, width)
    kernels.project_kernel[(_cdiv(patches, blocks["BLOCK_M"]) * _cdiv(channels, blocks["BLOCK_N"]),)](
        _grid(dfeatures), drows, weight, weight.stride(1), weight.stride(0), None, None,
        *looked_up, rows, patches, width, channels, FORWARD=False, **blocks,
    )  # fmt: skip


def _launch_dweight(
    kernels: Any, drows: Tensor, features: Tensor, looked_up: tuple[Any, ...], rows: int, dweight: Tensor
) -> None:
    (width, channels), patches = dweight.shape, _patches(features.shape)
    blocks = _product_blocks(features, channels, width)
    side_d = min(_power_of_two(width, 128), blocks["BLOCK_M"])
    parts = _cdiv(patches, _CHUNK)
    partial = dweight[None] if parts == 1 else dweight.new_empty(parts, width, channels)
    kernels.weight_kernel[(_cdiv(width, side_d) * _cdiv(channels, blocks["BLOCK_N"]), parts)](
        _grid(features), drows, partial, *looked_up, rows, patches, channels, width, _CHUNK,
        PRECISION=blocks["PRECISION"], BLOCK_D=side_d, BLOCK_C=blocks["BLOCK_N"], BLOCK_M=32,
        num_warps=blocks["num_warps"], num_stages=blocks["num_stages"],
    )  # fmt: skip
    if parts > 1:
        _sum_rows(partial.view(parts, -1), dweight.view(-1))


def _sum_rows(partial: Tensor, total: Tensor) -> None:
    """total = the sum over the first axis of partial, both float32."""
    from simvlm.kernels.stem.triton_gpu_batch_norm import sum_kernel

    parts, columns = partial.shape
    sum_kernel[(_cdiv(columns, 16),)](partial, total, parts, columns, BLOCK_K=64, BLOCK_C=16)


def _product_blocks(x: Tensor, width: int, depth: int) -> dict[str, Any]:
    """Tile sides and Triton's options of a product of patches that is `width` wide and sums over `depth`."""
    if x.dtype == torch.float32:
        # Three TF32 products carry float32's bits through the tensor cores; larger tiles of them spill.
        most, options = (64, 64, 32), {"PRECISION": "tf32x3", "num_warps": 4, "num_stages": 2}
    else:
        most, options = (128, 128, 64), {"PRECISION": "ieee", "num_warps": 8, "num_stages": 3}
    sides = {"BLOCK_M": most[0], "BLOCK_N": _power_of_two(width, most[1]), "BLOCK_K": _power_of_two(depth, most[2])}
    return sides | options


def _blocks(channels: int, elements: int) -> dict[str, int]:
    """The sides of a tile of so many elements: the channels' with the fewest of them beyond the last."""
    sides = [side for side in (128, 64, 32, 16) if side < 2 * channels or side == 16]
    side = min(sides, key=lambda side: (_cdiv(channels, side) * side, -side))
    return {"BLOCK_P": elements // side, "BLOCK_C": side}


def _parts(pixels: int, channels: int, blocks: dict[str, int]) -> tuple[int, int]:
    """(chunks, pixels of each) of a reduction; four tiles at least: the scratch is to be small beside the image."""
    tiles, most = _cdiv(pixels, blocks["BLOCK_P"]), max(_PROGRAMS // _cdiv(channels, blocks["BLOCK_C"]), 1)
    chunk = max(_cdiv(tiles, most), 4) * blocks["BLOCK_P"]
    return _cdiv(pixels, chunk), chunk


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, options) of a kernel that takes one tile of pixels and channels a program."""
    blocks = _blocks(x.shape[-1], 4096)
    grid = _cdiv(math.prod(x.shape[:3]), blocks["BLOCK_P"]), _cdiv(x.shape[-1], blocks["BLOCK_C"])
    return grid, blocks | {"num_warps": 8}


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return math.prod(x.shape[:3]), x.shape[3], x.shape[1], x.shape[2]


def _halves(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Each with memory of its own: outputs of a registered op may not share any."""
    first, second = sums.chunk(2)
    return first.clone(), second.clone()


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """What a kernel takes for an image: (itself, strides of image, row and column); a flat one's last is a pixel's."""
    image, row, column = x.stride()[:3]
    if _flat(x):
        column = next((x.stride(n) for n in (2, 1, 0) if x.shape[n] > 1), x.shape[3])
    return x, image, row, column


def _flat(x: Tensor) -> bool:
    """Whether one stride leads from each pixel to the next, through all images."""
    expected = None
    for n in (2, 1, 0):
        if x.shape[n] == 1:
            continue
        if expected is not None and x.stride(n) != expected:
            return False
        expected = x.stride(n) * x.shape[n]
    return True


def _grid(features: Tensor) -> tuple[Any, ...]:
    """What a kernel takes for features: (itself, strides of image, row and column, Gh, Gw)."""
    return features, *features.stride()[:3], *features.shape[1:3]


def _looked_up(places: Tensor) -> tuple[Any, ...]:
    """What a kernel takes for places: (itself, B, bits of B)."""
    return places.contiguous(), places.shape[1], places.shape[1].bit_length()


def _patches(image_shape: Any) -> int:
    return 0 if image_shape is None else math.prod(image_shape[:3])


def _power_of_two(n: int, most: int) -> int:
    """The smallest power of two that is at least n and 16 (tensor cores' least side), or `most` if that is less."""
    return min(max(16, 1 << (n - 1).bit_length()), most)


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)
