"""`prefix_attention` in Triton, for NVIDIA GPUs of compute capability 8.0 and up: choices, refusals and launches.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

One program per (tile of queries, head, sequence) forward and for dq, per (tile of keys, head, sequence) for dk and dv;
which tiles it meets it derives from the layout's integers, on the device. Saved for backward: out and lse. The kernels
are in `triton_gpu_forward.py`, `triton_gpu_backward.py` and `triton_gpu_table.py`; Triton is imported when the first
call runs, because that takes half a second. Sums are float32; tiles have fixed sizes, so that a sequence's numbers do
not depend on its batch. With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from simvlm.kernels import triton_device
from simvlm.kernels.attention import triton_gpu_launch
from simvlm.kernels.attention.layout import PrefixLayout

_SCRATCH_BYTES = 64 * 2**20
"""Room for the sums of ds over pairs of patches (grids with more go through it a few image rows at a time), and for the
expanded table (grids with more gather it)."""

_PART = 16
"""Sequences over which one program sums ds, where the scratch has room: enough programs to fill a GPU."""

_ROW_STRIDE = 2**24
"""In elements: the kernels place a tile with 64-bit numbers and the rows inside it with 32-bit ones."""


def unavailable() -> str | None:
    return triton_device.unavailable()


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> str | None:
    if (reason := triton_device.unsupported("q", q)) is not None:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if abs(x.stride(-3)) > _ROW_STRIDE:
            return f"{name}'s row stride must be at most {_ROW_STRIDE} elements, got {x.stride(-3)}: call .contiguous()"
    if rel_bias is not None and layout.image_grid is not None and _rows_at_once(q.shape[-2], layout.image_grid) == 0:
        return f"image_grid {layout.image_grid} is too large: one image row of pairs exceeds {_SCRATCH_BYTES} bytes"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `prefix_attention` documents them."""
    from simvlm.kernels.attention import triton_gpu_forward as kernels

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if layout.batch == 0 or q.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    heads, head_dim = q.shape[-2:]
    q, scale = _scaled(q, scale)
    inverse = 1 / scale
    constants = _constants(q, layout, rel_bias)
    chunks, _ = _tiles(layout.max_k_len, k, layout, kernels.CHUNK.value)
    programs = heads * layout.batch
    inputs = (*(_rows(_aligned(x), layout) for x in (q, k, v)),)
    with torch.cuda.device_of(q):
        table, form, blocks = _table("forward", rel_bias, q, layout, inverse)
        tiles, rows = _tiles(layout.max_q_len, q, layout, blocks["BLOCK_T"])
        kernels.forward_kernel[(tiles * programs,)](
            *inputs, _rows(out, layout), lse, table, layout.bounds, layout.batch, heads, tiles, rows, scale, inverse,
            SPLIT=chunks > 1, FORM=form, **constants, **blocks,
        )  # fmt: skip
        if chunks > 1:
            state = kernels.FEW.value * (head_dim + 2)
            states = torch.empty(programs * chunks * state, dtype=torch.float32, device=q.device)
            kernels.split_kernel[(chunks * programs,)](
                *inputs, states, table, layout.bounds, layout.batch, heads, chunks, scale, inverse,
                FORM=form, **constants, **blocks,
            )  # fmt: skip
            kernels.join_kernel[(programs,)](
                states, _rows(out, layout), lse, layout.bounds, layout.batch, heads, chunks,
                PADDED=layout.is_padded, WIDTHS=constants["WIDTHS"],
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    rel_bias: Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, drel_bias), None where not wanted."""
    from simvlm.kernels.attention import triton_gpu_backward as kernels

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if wanted[0] else None
    dk = dv = dtable = None
    if wanted[1] or wanted[2]:
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if wanted[3]:
        assert rel_bias is not None
        dtable = torch.zeros(rel_bias.shape, dtype=torch.float32, device=q.device)
    if layout.batch == 0 or q.numel() == 0 or k.numel() == 0:
        grads = [None if x is None else x.zero_() for x in (dq, dk, dv, dtable)]
    else:
        with torch.cuda.device_of(q):
            _launch_backward(kernels, dout, dlse, q, k, v, out, lse, layout, rel_bias, scale, dq, dk, dv, dtable)
        grads = [dq, dk, dv, dtable]
    if dtable is not None and rel_bias is not None:
        grads[3] = dtable.to(rel_bias.dtype)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))  # type: ignore[return-value]


def _launch_backward(
    kernels: Any,
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    rel_bias: Tensor | None,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dtable: Tensor | None,
) -> None:
    """Fills those of dq, dk, dv (the two together) and dtable that are there."""
    heads, head_dim = q.shape[-2:]
    constants = _constants(q, layout, rel_bias)
    total = lse.numel() // heads
    dq_scale = scale
    q, scale = _scaled(q, scale)
    inverse = 1 / scale
    lse2, delta = (torch.empty(heads, total, dtype=torch.float32, device=q.device) for _ in range(2))
    inputs = *(_rows(_aligned(x), layout) for x in (q, k, v, dout)), lse2, delta
    blocks = triton_gpu_launch.options("dq", head_dim, q.dtype, q.device, gathers=False)
    tiles, rows = _tiles(layout.max_q_len, q, layout, blocks["BLOCK_T"])
    programs = heads * layout.batch
    kernels.delta_kernel[(tiles * programs,)](
        inputs[3], _rows(out, layout), lse.contiguous(), dlse.contiguous(), lse2, delta, layout.bounds, layout.batch,
        heads, tiles, total, PADDED=layout.is_padded, WIDTHS=constants["WIDTHS"], BLOCK_T=blocks["BLOCK_T"],
    )  # fmt: skip
    table, form = None, "none"
    if dq is not None or dtable is not None:
        table, form, blocks = _table("dq", rel_bias, q, layout, inverse)
    if dq is not None:
        kernels.dq_kernel[(tiles * programs,)](
            *inputs, _rows(dq, layout), table, layout.bounds, layout.batch, heads, tiles, rows, total, scale, inverse,
            dq_scale, FORM=form, **constants, **blocks,
        )  # fmt: skip
    if dtable is not None and layout.image_grid is not None:
        sides, blocks = _sides(blocks), triton_gpu_launch.options("pairs", head_dim, q.dtype, q.device, gathers=False)
        whole = _rows_at_once(heads, layout.image_grid) == layout.image_grid[0]
        if form == "gathered" or sides != _sides(blocks) or not whole:  # other tiles than the expanded table's
            table, form = _float_table(rel_bias), "gathered"
            blocks = triton_gpu_launch.options("pairs", head_dim, q.dtype, q.device, gathers=True)
        _launch_table_gradient(inputs, dtable, table, form, layout, heads, total, scale, inverse, constants, blocks)
    del table
    if dk is not None and dv is not None:
        table, form, blocks = _table("dk_dv", rel_bias, q, layout, inverse)
        tiles, rows = _tiles(layout.max_k_len, k, layout, blocks["BLOCK_S"])
        kernels.dk_dv_kernel[(tiles * programs,)](
            *inputs, _rows(dk, layout), _rows(dv, layout), table, layout.bounds, layout.batch, heads, tiles, rows,
            total, scale, inverse, FORM=form, **constants, **blocks,
        )  # fmt: skip


def _launch_table_gradient(
    inputs: tuple[Any, ...],
    dtable: Tensor,
    table: Tensor | None,
    form: str,
    layout: PrefixLayout,
    heads: int,
    total: int,
    scale: float,
    inverse: float,
    constants: dict[str, Any],
    blocks: dict[str, int],
) -> None:
    """Adds to dtable, which is zero: ds of pairs of patches summed over the batch, then over equal offsets."""
    from simvlm.kernels.attention.triton_gpu_table import table_pairs_kernel, table_sum_kernel

    assert layout.image_grid is not None
    height, width = layout.image_grid
    patches = height * width
    at_once = _rows_at_once(heads, layout.image_grid)
    parts, sequences = _parts(layout.batch, heads, layout.image_grid)
    pairs = torch.empty(parts * heads * at_once * width * patches, dtype=torch.float32, device=dtable.device)
    tiles_j = -(-patches // blocks["BLOCK_S"])
    c, d = (min(_power_of_two(n), most) for n, most in ((width, 32), (2 * width - 1, 64)))
    for begin in range(0, height, at_once):
        end = min(begin + at_once, height)
        tiles_p = -(-(end - begin) * width // blocks["BLOCK_T"])
        table_pairs_kernel[(tiles_p * tiles_j * heads, parts)](
            *inputs, pairs, table, layout.bounds, layout.batch, heads, tiles_p, tiles_j, begin * width, end * width,
            total, sequences, scale, inverse, FORM=form, **constants, **blocks,
        )  # fmt: skip
        table_sum_kernel[(heads * (2 * height - 1), -(-(2 * width - 1) // d))](
            pairs, dtable, begin, end, parts, heads,
            GRID=layout.image_grid, BLOCK_Z=4096 // (c * d), BLOCK_C=c, BLOCK_D=d,
        )  # fmt: skip


def _sides(blocks: dict[str, int]) -> tuple[int, int, int]:
    """What an expanded table's tiles follow."""
    return blocks["BLOCK_T"], blocks["BLOCK_S"], blocks["WARPS"]


def _constants(q: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> dict[str, Any]:
    """The compile-time constants that all attention kernels take."""
    return {
        "PADDED": layout.is_padded,
        "GRID": None if rel_bias is None else layout.image_grid,
        "WIDTHS": _widths(q.shape[-1]),
        # Three TF32 products carry float32's bits through the tensor cores; 16-bit products are exact in any case.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
    }


def _scaled(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q', s) with q' · s = q · scale, where s is positive and so near to 1 that bias / s is a float32 number.

    q' is q itself for every scale that a model has, else q times 0, -1 or a power of two, which rounds nothing.
    """
    mantissa, exponent = math.frexp(scale)
    if scale == 0.0:
        return q * 0.0, 1.0
    if abs(exponent) < 30:
        return (q, scale) if scale > 0 else (-q, -scale)
    return q * math.ldexp(math.copysign(0.5, scale), exponent), 2 * abs(mantissa)


def _table(
    kernel: str, rel_bias: Tensor | None, q: Tensor, layout: PrefixLayout, inverse: float
) -> tuple[Tensor | None, str, dict[str, int]]:
    """(what the kernel takes for the table, its form "none", "gathered" or "expanded", the launch's options).

    See triton_gpu_table.py for the forms.
    """
    from simvlm.kernels.attention.triton_gpu_table import expand_kernel

    options = functools.partial(triton_gpu_launch.options, kernel, q.shape[-1], q.dtype, q.device)
    blocks = options(gathers=False)
    if rel_bias is None or layout.image_grid is None:
        return None, "none", blocks
    table = _float_table(rel_bias)
    transposed = kernel == "dk_dv"
    sides = (blocks["BLOCK_S"], blocks["BLOCK_T"]) if transposed else (blocks["BLOCK_T"], blocks["BLOCK_S"])
    patches, heads = layout.image_grid[0] * layout.image_grid[1], rel_bias.shape[0]
    row_tiles, col_tiles = (-(-patches // side) for side in sides)
    numbers = row_tiles * col_tiles * sides[0] * sides[1]
    if not layout.at_origin or 4 * heads * numbers > _SCRATCH_BYTES:
        return table, "gathered", options(gathers=True)
    expanded = torch.empty(heads, numbers, dtype=torch.float32, device=q.device)
    expand_kernel[(row_tiles * col_tiles, heads)](
        table, expanded, inverse, GRID=layout.image_grid, TRANSPOSED=transposed,
        BLOCK_ROW=sides[0], BLOCK_COL=sides[1], WARPS=blocks["WARPS"],
    )  # fmt: skip
    return expanded, "expanded", blocks


def _rows(x: Tensor, layout: PrefixLayout) -> tuple[Tensor, int, int, int]:
    """What a kernel takes for a tensor: (itself, batch stride, row stride, head stride), strides in multiples of 8."""
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x, strides[0] if layout.is_padded else 0, strides[-3], strides[-2]


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy if kernels cannot take its rows: the last axis side by side, other strides multiples of 8."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1][:-1]
    if x.stride(-1) == 1 and all(stride % 8 == 0 for stride in strides) and abs(x.stride(-3)) <= _ROW_STRIDE:
        return x
    return x.contiguous()


def _tiles(longest: int, x: Tensor, layout: PrefixLayout, block: int) -> tuple[int, int]:
    """(tiles per head and sequence that cover `longest` tokens of x, storage rows of x: per sequence where padded)."""
    rows = x.shape[1] if layout.is_padded else x.shape[0]
    return max(1, -(-min(longest, rows) // block)), rows


def _float_table(rel_bias: Tensor | None) -> Tensor | None:
    return None if rel_bias is None else rel_bias.to(torch.float32).contiguous()


def _widths(head_dim: int) -> tuple[int, int, int]:
    """(H, W, W2): H columns as two tiles with powers of two as widths, at least 16; W2 = 0 where one is no wider."""
    low = _power_of_two(head_dim // 2 + 1)
    high = _power_of_two(max(head_dim - low, 0))
    if low < 16 or head_dim == low or high >= low:
        return head_dim, _power_of_two(head_dim), 0
    return head_dim, low, high


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 16, the least side of a product on tensor cores."""
    return max(16, 1 << (n - 1).bit_length())


def _rows_at_once(heads: int, grid: tuple[int, int]) -> int:
    """Image rows of which the pairs with every patch fit into the scratch, for all heads; at most all."""
    height, width = grid
    return min(height, _SCRATCH_BYTES // (4 * heads * width * height * width))


def _parts(batch: int, heads: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(parts, sequences of each) of a batch whose ds are summed apart first: few, if their pairs fill the scratch."""
    room = _SCRATCH_BYTES // (4 * heads * (grid[0] * grid[1]) ** 2)
    sequences = max(_PART, -(-batch // max(room, 1)))
    return -(-batch // sequences), sequences
