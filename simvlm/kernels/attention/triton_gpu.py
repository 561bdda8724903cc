"""`prefix_attention` in Triton, for NVIDIA GPUs of compute capability 8.0 and up: choices, refusals and launches.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

One program per (tile of queries, head, sequence) forward and for dq, per (tile of keys, head, sequence) for dk and dv;
which tiles it meets it derives from the layout's integers, on the device. Saved for backward: out and lse. The kernels
are in `triton_gpu_forward.py` and `triton_gpu_backward.py`; Triton is imported when the first call runs, because that
takes half a second. Sums are float32; tiles have fixed sizes, so that a sequence's numbers do not depend on its batch.
With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from simvlm.kernels.attention.layout import PrefixLayout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCRATCH_BYTES = 64 * 2**20
"""Room for the sums of ds over pairs of patches; grids with more pairs go through it a few image rows at a time."""


_ROW_STRIDE = 2**24
"""In elements: the kernels place a tile with 64-bit numbers and the rows inside it with 32-bit ones."""


def unavailable() -> str | None:
    if not _installed():
        return "triton is not installed (pip install 'simvlm[triton]')"
    if not _interpreted() and not _has_gpu():
        return "no NVIDIA GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> str | None:
    if q.dtype not in _DTYPES:
        return f"q must be float32, bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if _interpreted():
        if q.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16 with TRITON_INTERPRET=1"
    elif q.device.type != "cuda":
        return f"tensors must be on an NVIDIA GPU, got {q.device} (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    elif torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU must be an NVIDIA one of compute capability 8.0 or higher"
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
    from simvlm.kernels.attention.triton_gpu_forward import forward_kernel

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if layout.batch == 0 or q.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    heads, head_dim = q.shape[-2:]
    blocks = _blocks(head_dim, q.dtype, backward=False)
    tiles, rows = _tiles(layout.max_q_len, q, layout, blocks["BLOCK_T"])
    with torch.cuda.device_of(q):
        forward_kernel[(tiles * heads * layout.batch,)](
            *(_rows(x, layout) for x in (q, k, v, out)),
            lse,
            _float_table(rel_bias),
            layout.bounds,
            layout.batch,
            heads,
            tiles,
            rows,
            scale,
            **_shared(q, layout, rel_bias),
            **blocks,
        )
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
    shared, blocks = _shared(q, layout, rel_bias), _blocks(head_dim, q.dtype, backward=True)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    if dout.stride(-1) != 1 or abs(dout.stride(-3)) > _ROW_STRIDE:
        dout = dout.contiguous()
    inputs = *(_rows(x, layout) for x in (q, k, v, dout)), lse.contiguous(), delta
    tiles, rows = _tiles(layout.max_q_len, q, layout, blocks["BLOCK_T"])
    table = _float_table(rel_bias)
    programs = heads * layout.batch
    kernels.delta_kernel[(tiles * programs,)](
        inputs[3],
        _rows(out, layout),
        *_rows(dlse[..., None], layout),
        delta,
        layout.bounds,
        layout.batch,
        heads,
        tiles,
        PADDED=layout.is_padded,
        WIDTHS=shared["WIDTHS"],
        BLOCK_T=blocks["BLOCK_T"],
    )
    if dq is not None:
        kernels.dq_kernel[(tiles * programs,)](
            *inputs,
            _rows(dq, layout),
            table,
            layout.bounds,
            layout.batch,
            heads,
            tiles,
            rows,
            scale,
            **shared,
            **blocks,
        )
    if dk is not None and dv is not None:
        tiles, rows = _tiles(layout.max_k_len, k, layout, blocks["BLOCK_S"])
        grads = _rows(dk, layout), _rows(dv, layout)
        kernels.dk_dv_kernel[(tiles * programs,)](
            *inputs, *grads, table, layout.bounds, layout.batch, heads, tiles, rows, scale, **shared, **blocks
        )
    if dtable is not None and layout.image_grid is not None:
        height, width = layout.image_grid
        at_once = _rows_at_once(heads, layout.image_grid)
        if q.dtype == torch.float32:  # this kernel holds four tiles of rows at once
            blocks |= {"BLOCK_T": 16, "num_warps": 4}
        pairs = torch.empty(heads * at_once * width * height * width, dtype=torch.float32, device=q.device)
        tiles_j = -(-height * width // blocks["BLOCK_S"])
        c, d = (min(_power_of_two(n), most) for n, most in ((width, 32), (2 * width - 1, 64)))
        for begin in range(0, height, at_once):
            end = min(begin + at_once, height)
            tiles_p = -(-(end - begin) * width // blocks["BLOCK_T"])
            kernels.table_pairs_kernel[(tiles_p * tiles_j * heads,)](
                *inputs, pairs, table, layout.bounds, layout.batch, heads, tiles_p, tiles_j,
                begin * width, end * width, scale, **shared, **blocks,
            )  # fmt: skip
            kernels.table_sum_kernel[(heads * (2 * height - 1), -(-(2 * width - 1) // d))](
                pairs, dtable, begin, end, GRID=layout.image_grid, BLOCK_C=c, BLOCK_D=d
            )


def _blocks(head_dim: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tile sides and Triton's options of the attention kernels.

    A sequence's numbers depend on the sides, so these follow from head_dim and dtype, never from lengths or the batch.
    float32 products are three products each; larger tiles of them spill.
    """
    wide = head_dim > 64
    if dtype == torch.float32:
        return {"BLOCK_T": 32, "BLOCK_S": 32, "num_warps": 8, "num_stages": 1 if wide else 2}
    return {"BLOCK_T": 64, "BLOCK_S": 64, "num_warps": 8 if wide or backward else 4, "num_stages": 2}


def _shared(q: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> dict[str, Any]:
    """The compile-time constants that all attention kernels take."""
    return {
        "PADDED": layout.is_padded,
        "GRID": None if rel_bias is None else layout.image_grid,
        "WIDTHS": _widths(q.shape[-1]),
        # Three TF32 products carry float32's bits through the tensor cores; 16-bit products are exact in any case.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
    }


def _rows(x: Tensor, layout: PrefixLayout) -> tuple[Tensor, int, int, int]:
    """What a kernel takes for a tensor: (itself, batch stride, row stride, head stride)."""
    return x, x.stride(0) if layout.is_padded else 0, x.stride(-3), x.stride(-2)


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


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None
