"""Kernels with known faults, through `benchmarks.gpu_compile`: its options, these calls in place of the package's."""

from __future__ import annotations

import functools
import sys

import torch
import triton
import triton.language as tl

from benchmarks import gpu_compile


@triton.jit
def product_kernel(x, out, PRECISION: tl.constexpr, INNER: tl.constexpr):
    """One product of a [64, INNER] tile with itself."""
    tile = tl.load(x + tl.arange(0, 64)[:, None] * INNER + tl.arange(0, INNER)[None, :])
    offs = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + offs, tl.dot(tile, tl.trans(tile), input_precision=PRECISION))


@triton.jit
def held_kernel(x, SIDE: tl.constexpr):
    """Holds a tile while it waits for the tile's sum."""
    offs = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tile = tl.load(x + offs)
    tl.store(x + offs, tile * tl.sum(tile))


@triton.jit
def lengths_kernel(x, length: tl.constexpr):
    """Takes a batch's length as a constant."""
    tl.store(x, length)


def product(lens: list[int], *, dtype: torch.dtype, inner: int, **options: int) -> None:
    product_kernel[(1,)](torch.empty(64, inner, dtype=dtype), torch.empty(64, 64), "ieee", inner, **options)


def held(lens: list[int], **options: int) -> None:
    held_kernel[(1,)](torch.empty(128, 128), 128, **options)


def lengths(lens: list[int]) -> None:
    lengths_kernel[(1,)](torch.empty(1), sum(lens))


def calls(dtype: str, head_dims: list[int], padded: bool):
    make = functools.partial(gpu_compile.Call, dtype=dtype, shape="tile", table=None)
    yield [make(op="sound", launch=functools.partial(product, dtype=torch.bfloat16, inner=64))]
    yield [make(op="spills", launch=functools.partial(held, maxnreg=64))]
    yield [make(op="shared", launch=functools.partial(product, dtype=torch.bfloat16, inner=2048, num_warps=16))]
    yield [make(op="off", launch=functools.partial(product, dtype=torch.float32, inner=16))]
    yield [make(op="fails", launch=functools.partial(product, dtype=torch.bfloat16, inner=64, maxnreg=24))]
    yield [make(op="again", launch=lengths)]


if __name__ == "__main__":
    sys.exit(gpu_compile.main(calls={"controls": calls}))
