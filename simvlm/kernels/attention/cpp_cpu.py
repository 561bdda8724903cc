"""`prefix_attention` on the CPU through the compiled module: torch tensors (with gradients) and numpy arrays (forward).

The kernels are in csrc/attention_*.cc; this file allocates, hands addresses and strides over, and nothing else. Saved
for backward: q, k, v, out and lse. Limits: float32, bfloat16, float16; the host only.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from simvlm.kernels import cpp_module
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.cpp_module import address


def unavailable() -> str | None:
    return cpp_module.unavailable()


def unsupported(q: Any, k: Any, v: Any, layout: PrefixLayout, rel_bias: Any) -> str | None:
    return cpp_module.unsupported(q)


def forward(q: Any, k: Any, v: Any, layout: PrefixLayout, rel_bias: Any, scale: float) -> tuple[Any, Any]:
    """(out, lse), contiguous; torch in, torch out; numpy in, numpy out."""
    if isinstance(q, np.ndarray):
        q, k, v = (cpp_module.in_elements(x) for x in (q, k, v))
        out, lse = np.empty(q.shape, q.dtype), np.empty(q.shape[:-1], np.float32)
        table = None if rel_bias is None else np.require(rel_bias, np.float32, ["C", "A"])
        threads = cpp_module.numpy_threads()
    else:
        torch = _torch()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32)
        table = None if rel_bias is None else rel_bias.to(torch.float32).contiguous()
        threads = torch.get_num_threads()
    bounds = _bounds(layout)
    if layout.batch == 0:  # nobody owns a row, so no task would write it
        out[...], lse[...] = 0, -math.inf
        return out, lse
    cpp_module.compiled().attention_forward(
        *(_strided(x) for x in (q, k, v, out)),
        *(address(x) for x in (lse, table, bounds)),
        *_statics(q, k, layout, scale, threads),
    )
    return out, lse


def backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    layout: PrefixLayout,
    rel_bias: Any,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Any, Any, Any, Any]:
    """(dq, dk, dv, drel_bias) for torch tensors, contiguous, None where not wanted."""
    torch = _torch()
    dq, dk, dv = (x.new_empty(x.shape) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    table = None if rel_bias is None else rel_bias.to(torch.float32).contiguous()
    dtable = torch.empty_like(table) if wanted[3] else None
    if layout.batch == 0:
        for grad in (dq, dk, dv, dtable):
            if grad is not None:
                grad.zero_()
    else:
        dout, q, k, v, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, q, k, v, out))
        lse, dlse, bounds = lse.contiguous(), dlse.contiguous(), _bounds(layout)
        cpp_module.compiled().attention_backward(
            *(_strided(x) for x in (q, k, v, out, dout, dq, dk, dv)),
            *(address(x) for x in (lse, dlse, table, dtable, bounds)),
            *_statics(q, k, layout, scale, torch.get_num_threads()),
        )
    return dq, dk, dv, None if dtable is None else dtable.to(rel_bias.dtype)


def _torch() -> Any:
    """torch, which a caller with torch tensors has imported; numpy callers need not have it."""
    return sys.modules["torch"]


def _bounds(layout: PrefixLayout) -> Any:
    """The layout's int32[7, B], contiguous, as a torch tensor or numpy array."""
    bounds = layout.bounds
    return bounds.int().contiguous() if hasattr(bounds, "data_ptr") else np.ascontiguousarray(bounds, np.int32)


def _statics(q: Any, k: Any, layout: PrefixLayout, scale: float, threads: int) -> tuple[Any, ...]:
    axis = 1 if layout.is_padded else 0
    height, width = layout.image_grid or (0, 0)
    storage = (layout.is_padded, q.shape[axis], k.shape[axis])
    return (layout.batch, *q.shape[-2:], *storage, height, width, scale, cpp_module.dtype_code(q), threads)


def _strided(x: Any) -> tuple[int, int, int, int]:
    """Address, then the strides of sequence (0 if packed), row and head in elements."""
    if x is None:
        return 0, 0, 0, 0
    *sequence, row, head, _ = cpp_module.element_strides(x)
    return address(x), sequence[0] if sequence else 0, row, head
