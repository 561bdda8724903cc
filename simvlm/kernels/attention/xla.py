"""`prefix_attention` in plain JAX, for whatever XLA compiles to: CPU, GPU, above all TPU.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

One sequence after the other, of each the blocks that its integers make visible, each block cut from storage where it
lies (`dynamic_slice`) and written back where it belongs (`dynamic_update_slice`): one compiled program serves every
layout of the same shapes, nothing is unpacked, memory grows with the rows of storage. Padded storage is packed storage
whose sequences start T rows apart. A block may reach into the rows of the next sequence: what it reads there is masked,
what it writes there are zeros, which the owner overwrites, for ranges ascend.

Heads run in groups small enough for the blocks of scores and for the table's scratch. Saved for backward: out and lse.
Sums are float32 and have a fixed order. Differentiable once, in reverse; jvp and jacfwd raise JAX's own error about
functions with a custom vjp. The passes: xla_blocks.py; the table: xla_table.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simvlm.kernels.attention import jax_op
from simvlm.kernels.attention.jax_op import Wanted
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.attention.xla_blocks import (
    BLOCK_S,
    BLOCK_T,
    SCRATCH_BYTES,
    Call,
    backward_heads,
    forward_heads,
)
from simvlm.kernels.attention.xla_table import Spread
from simvlm.kernels.manual_axes import varying_alike

Array = Any  # jax arrays and tracers


def unavailable() -> str | None:
    return None


def unsupported(q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None) -> str | None:
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"q must be float32, bfloat16 or float16, got {q.dtype}"
    if rel_bias is not None and layout.image_grid is not None:
        spread = _spread(layout, *_longest(q, k, layout))
        if spread.bytes_a_head > SCRATCH_BYTES:
            return f"image_grid {layout.image_grid} is too large: a head's table would take {spread.bytes_a_head} bytes"
    return None


def forward(
    q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None, scale: float
) -> tuple[Array, Array]:
    """(out, lse) as `prefix_attention` documents them; differentiable once, in reverse."""
    if layout.batch == 0 or q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    q_len, k_len = _longest(q, k, layout)
    call = Call(
        block_t=_block(q_len, BLOCK_T),
        block_s=_block(k_len, BLOCK_S),
        spread=None if rel_bias is None else _spread(layout, q_len, k_len),
        keys_ascend=layout.keys_ascend,
        scale=scale,
    )
    if call.spread:
        call = dataclasses.replace(call, block_t=call.spread.block_t)
    rows = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    arrays = varying_alike(*rows, rel_bias, jnp.asarray(layout.bounds, jnp.int32))
    out, lse = _attention(call, *arrays)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _longest(q: Array, k: Array, layout: PrefixLayout) -> tuple[int, int]:
    """Static bounds on the lengths of a sequence's queries and keys."""
    return layout.padded_shape or (min(layout.max_q_len, q.shape[0]), min(layout.max_k_len, k.shape[0]))


def _block(length: int, most: int) -> int:
    """The rows of a block: `length` in equal parts of at most `most`, whole tiles of the matrix unit where it can."""
    part = -(-length // max(1, -(-length // most)))
    tile = 128 if part > 128 else 16
    return -(-part // tile) * tile


def _spread(layout: PrefixLayout, q_len: int, k_len: int) -> Spread:
    """The table's geometry, with blocks of queries short enough for its scratch where that can be."""
    assert layout.image_grid
    for most in (BLOCK_T, 128):
        spread = Spread(layout.image_grid, _block(q_len, most), _block(k_len, BLOCK_S), layout.at_origin)
        if spread.bytes_a_head <= SCRATCH_BYTES:
            break
    return spread


def _forward(call: Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> tuple[Array, Array]:
    return _over_heads(forward_heads, call)(bounds, q, k, v, table)


def _backward(
    call: Call,
    wanted: Wanted,
    dout: Array,
    dlse: Array | None,
    q: Array,
    k: Array,
    v: Array,
    table: Array | None,
    bounds: Array,
    out: Array,
    lse: Array,
) -> tuple[Array | None, ...]:
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    run = _over_heads(functools.partial(backward_heads, wanted=wanted), call)
    return run(bounds, q, k, v, table, dout, lse, delta)


_attention = jax_op.differentiable("xla", _forward, _backward)


def _over_heads(kernel: Any, call: Call) -> Any:
    """kernel(call, bounds, *arrays) on storage [R, N, …] and tables [N, …, …], over groups of heads.

    The kernel sees [G, R, …]. A dimension that vmap maps becomes more heads; lengths that differ over it, a loop.
    """

    @jax.custom_batching.custom_vmap
    def run(bounds: Array, q: Array, k: Array, v: Array, table: Array | None, *rest: Array) -> Any:
        heads = q.shape[1]
        group = call.group(heads)

        def split(x: Array) -> Array:
            return x.reshape(heads // group, group, *x.shape[1:])

        storage = [split(jnp.moveaxis(x, 1, 0)) for x in (q, k, v, *rest)]
        arrays = (*storage[:3], None if table is None else split(table), *storage[3:])
        found = lax.map(lambda arrays: kernel(call, bounds, *arrays), arrays)
        found = [None if x is None else x.reshape(heads, *x.shape[2:]) for x in found]
        # Gradients come in the order of the arrays, so the fourth is the table's.
        return tuple(x if x is None or index == 3 else jnp.moveaxis(x, 0, 1) for index, x in enumerate(found))

    @run.def_vmap
    def mapped(size: int, batched: Any, bounds: Array, *arrays: Any) -> Any:
        lengths_differ, *of_arrays = batched
        if lengths_differ:
            whole = jax.tree.map(
                lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), arrays, tuple(of_arrays)
            )
            found = lax.map(lambda args: run(*args), (bounds, *whole))
            return found, jax.tree.map(lambda _: True, found)

        def folded(index: int, x: Array | None, is_batched: Any) -> Array | None:
            if x is None:
                return None
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            if index == 3:
                return x.reshape(-1, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

        def unfolded(index: int, x: Array | None) -> Array | None:
            if x is None:
                return None
            if index == 3:
                return x.reshape(size, -1, *x.shape[1:])
            return jnp.moveaxis(x.reshape(x.shape[0], size, -1, *x.shape[2:]), 1, 0)

        found = run(bounds, *(folded(i, x, b) for i, (x, b) in enumerate(zip(arrays, of_arrays, strict=True))))
        found = tuple(unfolded(i, x) for i, x in enumerate(found))
        return found, jax.tree.map(lambda _: True, found)

    return run
