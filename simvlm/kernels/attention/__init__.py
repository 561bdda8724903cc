"""`prefix_attention`: attention with a learnable 2D relative-position table and prefix-causal masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from simvlm.kernels import dispatch
from simvlm.kernels.arrays import autocast, dtype_name, last_axis_contiguous, strides
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.attention.table import IMPLS

OP = "prefix_attention"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def prefix_attention(
    q: Any,
    k: Any,
    v: Any,
    layout: PrefixLayout,
    *,
    rel_bias: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Attention of every query over the keys its layout lets it see, with an additive bias between image patches.

    For sequence b, head n, query i at position `p = q_offsets[b] + i` and key j:

        visible  iff  j < prefix_lens[b] or j <= p
        score    =    scale · <q_i, k_j> + rel_bias[n, row(j) - row(p) + Gh - 1, col(j) - col(p) + Gw - 1]
        out      =    Σ_j softmax_j(score over visible j) · v_j
        lse      =    ln Σ_j exp(score over visible j)

    with the bias only where both p and j are image patches. A query that sees no key gives out = 0, lse = -inf. Rows
    that belong to no sequence give out = 0 whatever they hold. Deterministic, gradients included. The table is the
    2D relative attention of CoAtNet (Dai et al. 2021, §2.1) as SimVLM (Wang et al. 2022, §3.2) uses it; the mask is
    SimVLM's PrefixLM (§3.1).

    Args:
        q: float[B, T, N, H] with a padded layout, float[R, N, H] with a packed one; float32, bfloat16, float16, or
            float64 (reference only). H is a multiple of 8 up to 128. Any strides with the last axis contiguous.
        k, v: float[B, S, N, H] or float[R', N, H], q's dtype.
        layout: who sees whom; built once a batch, on q's device.
        rel_bias: float[N, 2Gh-1, 2Gw-1], any float dtype, or None.
        scale: a Python float; None: 1/sqrt(H).
        return_lse: also return lse, float32 (float64 for float64), q's shape less its last axis.
        impl: the name of one implementation (see `implementations`); None: the first that takes the call.

    Returns:
        out, in q's dtype and shape; (out, lse) with `return_lse`. Gradients flow from both to q, k, v and rel_bias
        (torch and jax; numpy arrays are forward only).

    Raises:
        TypeError, ValueError: an argument is not what is written here; the message names it.
        UnsupportedError: the implementation that was named cannot take the call.
    """
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"{OP}: layout must be a PrefixLayout, got {type(layout).__name__}")
    arrays = {"q": q, "k": k, "v": v} if rel_bias is None else {"q": q, "k": k, "v": v, "rel_bias": rel_bias}
    try:
        family = dispatch.family_of(**arrays)
    except TypeError as error:
        raise TypeError(f"{OP}: {error}") from None
    impl = dispatch.checked_name(OP, IMPLS, family, impl)
    if family == "torch":
        from simvlm.kernels.attention import torch_op

        q, k, v = autocast(q, k, v)
    scale = _check(family, q, k, v, layout, rel_bias, scale)
    if family == "torch":
        out, lse = torch_op.prefix_attention(q, k, v, layout, rel_bias, scale, impl)
    else:
        kernel = dispatch.select(OP, IMPLS, family, impl, q, k, v, layout, rel_bias)
        out, lse = kernel.forward(q, k, v, layout, rel_bias, scale)
    return (out, lse) if return_lse else out


def _check(family: str, q: Any, k: Any, v: Any, layout: PrefixLayout, rel_bias: Any, scale: Any) -> float:
    """Raises unless the call is the contract's; returns the scale."""
    layout.check_bounds(OP)
    dtype = dtype_name(q)
    if dtype not in _DTYPES:
        raise TypeError(f"{OP}: q must be {', '.join(_DTYPES[:-1])} (or float64, reference only), got {dtype}")
    rank, axes = (4, "[B, T, N, H]") if layout.is_padded else (3, "[R, N, H]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != rank:
            form = "padded" if layout.is_padded else "packed"
            raise ValueError(
                f"{OP}: {name} must have {rank} axes {axes} with a {form} layout, got shape {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            got = f"{dtype_name(q)} for q and {dtype_name(x)} for {name}"
            raise TypeError(f"{OP}: q, k and v must have one dtype, got {got}")
        if not last_axis_contiguous(family, x):
            raise ValueError(
                f"{OP}: {name} must be contiguous in its last axis, got strides {strides(x)}: call .contiguous()"
            )
    heads, head_dim = q.shape[-2:]
    if heads < 1:
        raise ValueError(f"{OP}: q must have at least one head, got shape {tuple(q.shape)}")
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"{OP}: head_dim (q's last axis) must be a multiple of 8 from 8 to 128, got {head_dim}")
    if tuple(k.shape) != tuple(v.shape):
        raise ValueError(f"{OP}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if tuple(k.shape[-2:]) != (heads, head_dim):
        raise ValueError(f"{OP}: k must have q's heads and head_dim {(heads, head_dim)}, got {tuple(k.shape[-2:])}")
    _check_storage(q, k, layout)
    if family == "torch":
        _check_devices(q, k, v, layout, rel_bias)
        if not layout.keys_ascend and _wants_grad(k, v):
            raise ValueError(
                f"{OP}: k and v must not require a gradient where the layout's key ranges overlap or do not ascend; "
                "detach them, or give every sequence its own keys"
            )
    if rel_bias is not None:
        _check_table(rel_bias, heads, layout)
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{OP}: scale must be a Python float, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale must be finite, got {scale}")
    return float(scale)


def _check_storage(q: Any, k: Any, layout: PrefixLayout) -> None:
    if layout.padded_shape is not None:
        want = (layout.batch, *layout.padded_shape)
        for name, x, length in (("q", q, want[1]), ("k", k, want[2])):
            if tuple(x.shape[:2]) != (want[0], length):
                raise ValueError(
                    f"{OP}: {name} must begin with the layout's batch and length {(want[0], length)}, "
                    f"got {tuple(x.shape[:2])}"
                )
        return
    for name, x, rows in (("q", q, layout.q_rows), ("k", k, layout.k_rows)):
        if x.shape[0] < rows:
            raise ValueError(f"{OP}: {name} must have at least the layout's {rows} rows, got {x.shape[0]}")


def _check_devices(q: Any, k: Any, v: Any, layout: PrefixLayout, rel_bias: Any) -> None:
    for name, x in (("k", k), ("v", v), ("rel_bias", rel_bias)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{OP}: {name} must be on q's device {q.device}, got {x.device}")
    # A layout in numpy is on the host: fine for CPU tensors, a copy in every layer for others.
    where = "cpu" if isinstance(layout.bounds, np.ndarray) else layout.bounds.device.type
    if where != q.device.type:
        raise ValueError(
            f"{OP}: layout must be on q's device {q.device}, got {where}: call layout.to(q.device) once a batch"
        )


def _check_table(rel_bias: Any, heads: int, layout: PrefixLayout) -> None:
    if layout.cross:
        raise ValueError(
            f"{OP}: rel_bias must be None with a cross layout (its keys are no patches of the queries' image)"
        )
    if layout.image_grid is None:
        raise ValueError(
            f"{OP}: rel_bias must be None with a layout that has no image_grid; give the layout image_grid=(Gh, Gw)"
        )
    height, width = layout.image_grid
    want = (heads, 2 * height - 1, 2 * width - 1)
    if tuple(rel_bias.shape) != want:
        raise ValueError(f"{OP}: rel_bias must have shape [N, 2Gh-1, 2Gw-1] = {want}, got {tuple(rel_bias.shape)}")
    if "float" not in dtype_name(rel_bias):
        raise TypeError(f"{OP}: rel_bias must be floating point, got {dtype_name(rel_bias)}")


def _wants_grad(*tensors: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
