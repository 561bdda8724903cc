"""`prefix_attention` in plain JAX, for whatever XLA compiles to: CPU, GPU, TPU.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

Blockwise: [B, N, 128, 128] scores are the largest thing that depends on two lengths. The loops run over blocks that
some sequence of the batch sees, up to bounds taken from the layout's integers, so that one compiled program serves
every layout of the same shapes. Saved for backward: out and lse; the one backward pass goes over key blocks and carries
dq along. Sums are float32 and have a fixed order. Differentiable once, in reverse; jvp and jacfwd raise JAX's own error
about functions with a custom vjp.

The table is expanded to [N, I, I] once per call by a skew (repeat, reshape, slice), whose transpose is the reduction of
its gradient: no gather, no scatter. Packed storage is unpacked to [B, N, max_len, H] by one gather of rows and packed
again by another, so there memory grows with B · max_len, not with R.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simvlm.kernels.attention.layout import PrefixLayout

Array = Any  # jax arrays and tracers

_BLOCK = 128
_SCRATCH_BYTES = 64 * 2**20
# Finite, because -inf - (-inf) is NaN where a query has seen nothing yet, and below every score that means anything.
_NO_SCORE = -1.0e30


def unavailable() -> str | None:
    return None


def unsupported(q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None) -> str | None:
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"q must be float32, bfloat16 or float16, got {q.dtype}"
    if rel_bias is not None and layout.image_grid is not None:
        patches = layout.image_grid[0] * layout.image_grid[1]
        if 4 * q.shape[-2] * patches**2 > _SCRATCH_BYTES:
            return f"image_grid {layout.image_grid} is too large: the expanded table exceeds {_SCRATCH_BYTES} bytes"
    return None


def forward(
    q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None, scale: float
) -> tuple[Array, Array]:
    """(out, lse) as `prefix_attention` documents them; differentiable once, in reverse."""
    if layout.batch == 0 or q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    call = _Call(
        padded_shape=layout.padded_shape,
        image_grid=layout.image_grid if rel_bias is not None else None,
        q_len=layout.padded_shape[0] if layout.padded_shape else min(layout.max_q_len, q.shape[0]),
        k_len=layout.padded_shape[1] if layout.padded_shape else min(layout.max_k_len, k.shape[0]),
        at_origin=layout.at_origin,
        keys_ascend=layout.keys_ascend,
        scale=scale,
    )
    return _attention(call, q, k, v, rel_bias, jnp.asarray(layout.bounds, jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call; q_len and k_len are the lengths of the unpacked arrays."""

    padded_shape: tuple[int, int] | None
    image_grid: tuple[int, int] | None
    q_len: int
    k_len: int
    at_origin: bool
    keys_ascend: bool
    scale: float

    @property
    def block_t(self) -> int:
        return min(_BLOCK, self.q_len)

    @property
    def block_s(self) -> int:
        return min(_BLOCK, self.k_len)

    @property
    def patches(self) -> int:
        return self.image_grid[0] * self.image_grid[1] if self.image_grid else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> tuple[Array, Array]:
    return _forward(call, q, k, v, table, bounds)


def _attention_fwd(call: _Call, q: Any, k: Any, v: Any, table: Any, bounds: Any) -> tuple[Any, Any]:
    if not call.keys_ascend and (k.perturbed or v.perturbed):
        raise ValueError(
            "prefix_attention: k and v must not be differentiated where the layout's key ranges overlap or do not "
            "ascend; use jax.lax.stop_gradient, or give every sequence its own keys"
        )
    table_wanted = table is not None and table.perturbed
    q, k, v, bounds = q.value, k.value, v.value, bounds.value
    table = None if table is None else table.value
    out, lse = _forward(call, q, k, v, table, bounds)
    # Whether the table's gradient is wanted travels as the structure of the residuals: {} or None.
    return (out, lse), (q, k, v, table, bounds, out, lse, {} if table_wanted else None)


def _attention_bwd(call: _Call, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    *residuals, marker = saved
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x for x in cotangents)
    return *_backward_once(call, marker is not None, dout, dlse, *residuals), None


def _is_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _backward_once(call: _Call, table_wanted: bool, *arrays: Any) -> tuple[Any, ...]:
    return _backward(call, table_wanted, *arrays)


def _no_second_gradient(*_: Any) -> Any:
    raise NotImplementedError("prefix_attention: double backward is not supported by impl='xla'")


_backward_once.defvjp(_no_second_gradient, _no_second_gradient)


def _forward(call: _Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> tuple[Array, Array]:
    q_starts, q_lens, k_starts, k_lens, prefix_lens, q_offsets, image_lens = bounds
    q_BNTH = _unpack(call, q, q_starts, q_lens, call.q_len, call.block_t)
    k_BNSH = _unpack(call, k, k_starts, k_lens, call.k_len, call.block_s)
    v_BNSH = _unpack(call, v, k_starts, k_lens, call.k_len, call.block_s)
    expanded = _expanded(call, table)
    batch, heads, length, head_dim = q_BNTH.shape

    def query_block(t: Array) -> tuple[Array, Array]:
        q_block = _slice(q_BNTH, t, call.block_t)
        i = t * call.block_t + jnp.arange(call.block_t)
        position = q_offsets[:, None] + i
        limit = jnp.where(i < q_lens[:, None], jnp.minimum(k_lens[:, None], _seen(prefix_lens, position)), 0)
        end = _ceil_div(limit.max(), call.block_s)

        def attend(s: Array, state: Any, biased: bool) -> Any:
            mixed, top, total = state
            j = s * call.block_s + jnp.arange(call.block_s)
            scores = _products(q_block, _slice(k_BNSH, s, call.block_s)) * call.scale
            if biased:
                scores += _bias_block(call, expanded, position, j, t, s, image_lens)
            scores = jnp.where((j < limit[:, :, None])[:, None], scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            mixed = mixed * shrink[..., None] + _mix(p.astype(v.dtype), _slice(v_BNSH, s, call.block_s))
            return mixed, new_top, total * shrink + p.sum(-1)

        state = (
            jnp.zeros((batch, heads, call.block_t, head_dim), jnp.float32),
            jnp.full((batch, heads, call.block_t), _NO_SCORE, jnp.float32),
            jnp.zeros((batch, heads, call.block_t), jnp.float32),
        )
        mixed, top, total = _two_loops(call, 0, _last_biased(call, t, call.block_t, call.block_s), end, attend, state)
        seen = total != 0
        total = jnp.where(seen, total, 1.0)
        return mixed / total[..., None], jnp.where(seen, top + jnp.log(total), -jnp.inf)

    out, lse = lax.map(query_block, jnp.arange(length // call.block_t))
    out = _pack(call, _joined(out), q_starts, q_lens, q.shape[0], call.q_len, 0.0)
    lse = _pack(call, _joined(lse)[..., None], q_starts, q_lens, q.shape[0], call.q_len, -jnp.inf)
    return out.astype(q.dtype), lse[..., 0]


def _backward(
    call: _Call,
    table_wanted: bool,
    dout: Array,
    dlse: Array,
    q: Array,
    k: Array,
    v: Array,
    table: Array | None,
    bounds: Array,
    out: Array,
    lse: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dtable): p = exp(score - lse), ds = p · (<dout, v> - delta), delta = <dout, out> - dlse."""
    q_starts, q_lens, k_starts, k_lens, prefix_lens, q_offsets, image_lens = bounds
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True) - dlse[..., None]
    q_BNTH, dout_BNTH, delta_BNT1, lse_BNT1 = (
        _unpack(call, x, q_starts, q_lens, call.q_len, call.block_t) for x in (q, dout, delta, lse[..., None])
    )
    lse_BNT1 = jnp.where(lse_BNT1 == -jnp.inf, jnp.inf, lse_BNT1)  # a query that sees no key has p = 0
    k_BNSH = _unpack(call, k, k_starts, k_lens, call.k_len, call.block_s)
    v_BNSH = _unpack(call, v, k_starts, k_lens, call.k_len, call.block_s)
    expanded = _expanded(call, table)
    q_end = _ceil_div(q_lens.max(), call.block_t)

    def key_block(carry: Any, s: Array) -> Any:
        k_block, v_block = _slice(k_BNSH, s, call.block_s), _slice(v_BNSH, s, call.block_s)
        first = s * call.block_s
        j = first + jnp.arange(call.block_s)
        # Key `first` is seen from query first - q_offset on, and by all inside the prefix; absent, by none.
        some = jnp.where(first < prefix_lens, 0, jnp.maximum(first - q_offsets, 0))
        begin = jnp.where(first < k_lens, some, call.q_len + call.block_t).min() // call.block_t

        def attend(t: Array, state: Any, biased: bool) -> Any:
            dq, pairs, dk_block, dv_block = state
            i = t * call.block_t + jnp.arange(call.block_t)
            position = q_offsets[:, None] + i
            q_block, dout_block = _slice(q_BNTH, t, call.block_t), _slice(dout_BNTH, t, call.block_t)
            scores = _products(q_block, k_block) * call.scale
            if biased:
                scores += _bias_block(call, expanded, position, j, t, s, image_lens)
            limit = jnp.where(i < q_lens[:, None], jnp.minimum(k_lens[:, None], _seen(prefix_lens, position)), 0)
            p = jnp.exp(scores - _slice(lse_BNT1, t, call.block_t))
            p = jnp.where((j < limit[:, :, None])[:, None], p, 0.0)
            ds = p * (_products(dout_block, v_block) - _slice(delta_BNT1, t, call.block_t))
            dv_block += _mix(p.astype(v.dtype).mT, dout_block)
            dk_block += _mix(ds.astype(q.dtype).mT, q_block)
            dq = _add_at(dq, _mix(ds.astype(q.dtype), k_block), (0, 0, t * call.block_t, 0))
            if biased and pairs is not None:
                pairs = _add_pairs(call, pairs, ds, position, j, t, s, image_lens)
            return dq, pairs, dk_block, dv_block

        zeros = jnp.zeros(k_block.shape, jnp.float32)
        last_biased = _last_biased(call, s, call.block_s, call.block_t)
        *carry, dk_block, dv_block = _two_loops(call, begin, last_biased, q_end, attend, (*carry, zeros, zeros))
        return tuple(carry), (dk_block * call.scale, dv_block)

    pairs = jnp.zeros(expanded.shape, jnp.float32) if table_wanted and expanded is not None else None
    carry = jnp.zeros(q_BNTH.shape, jnp.float32), pairs
    (dq, pairs), (dk, dv) = lax.scan(key_block, carry, jnp.arange(k_BNSH.shape[2] // call.block_s))
    dq = _pack(call, dq * call.scale, q_starts, q_lens, q.shape[0], call.q_len, 0.0)
    dk, dv = (_pack(call, _joined(x), k_starts, k_lens, k.shape[0], call.k_len, 0.0) for x in (dk, dv))
    dtable = None if table is None else jnp.zeros_like(table)
    if pairs is not None and table is not None:
        _, reduce = jax.vjp(lambda table: _expanded(call, table), table.astype(jnp.float32))
        dtable = reduce(pairs)[0].astype(table.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dtable


def _seen(prefix_lens: Array, position: Array) -> Array:
    """[B, T]: how many of enough keys the query at `position` sees."""
    return jnp.maximum(prefix_lens[:, None], position + 1)


def _two_loops(call: _Call, begin: Array, biased: Array, end: Array, body: Any, state: Any) -> Any:
    """body(index, state, is_biased) over begin … end, the indices below `biased` with the table."""
    if call.image_grid is not None:
        biased = jnp.clip(biased, begin, jnp.maximum(begin, end))
        state = lax.fori_loop(begin, biased, functools.partial(body, biased=True), state)
        begin = biased
    return lax.fori_loop(begin, end, functools.partial(body, biased=False), state)


def _last_biased(call: _Call, index: Array, block: int, other_block: int) -> Array:
    """Up to which block of the other axis block `index` may meet pairs of patches."""
    return jnp.where(index * block < call.patches, -(-call.patches // other_block), 0)


def _products(a: Array, b: Array) -> Array:
    """float32[B, N, T, S]: the products of the rows of a and b."""
    return jnp.einsum("bnth,bnsh->bnts", a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _mix(weights: Array, rows: Array) -> Array:
    """float32[B, N, T, H]: sums of rows."""
    return jnp.einsum("bnts,bnsh->bnth", weights, rows, precision=_precision(rows), preferred_element_type=jnp.float32)


def _precision(x: Array) -> lax.Precision | None:
    # A TPU's default for float32 is one bfloat16 product.
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _slice(x: Array, index: Array, block: int) -> Array:
    """Block `index` of axis 2."""
    return lax.dynamic_slice_in_dim(x, index * block, block, 2)


def _joined(blocks: Array) -> Array:
    """[B, N, T, …] from the blocks that a loop stacked, [T / block, B, N, block, …]."""
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _add_at(total: Array, part: Array, start: tuple[Any, ...]) -> Array:
    return lax.dynamic_update_slice(total, lax.dynamic_slice(total, start, part.shape) + part, start)


def _ceil_div(n: Array, block: int) -> Array:
    return (n + block - 1) // block


def _unpack(call: _Call, x: Array, starts: Array, lens: Array, length: int, block: int) -> Array:
    """[B, N, L, …], L = `length` rounded up to whole blocks; zeros where no token is, whatever storage holds there."""
    i = jnp.arange(length)
    if call.padded_shape is None:
        x = jnp.take(x, starts[:, None] + i, axis=0, mode="clip")
    x = jnp.where((i < lens[:, None])[:, :, None, None], x, jnp.zeros((), x.dtype))
    return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -length % block), (0, 0)))


def _pack(call: _Call, x: Array, starts: Array, lens: Array, rows: int, length: int, fill: float) -> Array:
    """Storage from [B, N, L, …]; rows that no sequence owns hold `fill`."""
    x = jnp.moveaxis(x, 1, 2)
    if call.padded_shape is not None:
        real = jnp.arange(length) < lens[:, None]
        return jnp.where(real[:, :, None, None], x[:, :length], fill)
    row = jnp.arange(rows)
    owner = jnp.minimum(jnp.searchsorted(starts + lens, row, side="right"), len(starts) - 1)
    i = row - starts[owner]
    flat = x.reshape(-1, *x.shape[2:])
    real = (i >= 0) & (i < lens[owner])
    return jnp.where(real[:, None, None], jnp.take(flat, owner * x.shape[1] + i, axis=0, mode="clip"), fill)


def _expanded(call: _Call, table: Array | None) -> Array | None:
    """float32[N, I, I] from [N, 2Gh-1, 2Gw-1], zero-padded to whole blocks and, for any offset, one block more."""
    if table is None or call.image_grid is None:
        return None
    height, width = call.image_grid
    x = _skew(_skew(table.astype(jnp.float32), width).swapaxes(1, 2).swapaxes(2, 3), height)
    # [N, c, c', r, r'] -> [N, r, c, r', c']
    x = x.transpose(0, 3, 1, 4, 2).reshape(-1, call.patches, call.patches)
    more = 0 if call.at_origin else call.block_t
    return jnp.pad(x, ((0, 0), (0, -call.patches % call.block_t + more), (0, -call.patches % call.block_s)))


def _skew(x: Array, side: int) -> Array:
    """[…, i, j] = x[…, j - i + side - 1] for i, j < side, without a gather.

    Copies of x with one zero appended, end to end, and read in rows one element shorter: each row starts one later.
    """
    span = 2 * side - 1
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], side, span + 1)).reshape(*x.shape[:-1], -1)
    return x[..., : side * span].reshape(*x.shape[:-1], side, span)[..., side - 1 :]


def _bias_block(
    call: _Call, expanded: Array, position: Array, j: Array, t: Array, s: Array, image_lens: Array
) -> Array:
    """float32[B, N, T, S] (B may be 1): the table's entries for one block of queries and one of keys."""
    shape = (expanded.shape[0], call.block_t, call.block_s)
    column = s * call.block_s
    if call.at_origin:
        bias = lax.dynamic_slice(expanded, (0, t * call.block_t, column), shape)[None]
    else:
        rows = _first_rows(call, expanded, position)
        bias = jax.vmap(lambda row: lax.dynamic_slice(expanded, (0, row, column), shape))(rows)
    return jnp.where(_inside(position, j, image_lens), bias, 0.0)


def _add_pairs(
    call: _Call, pairs: Array, ds: Array, position: Array, j: Array, t: Array, s: Array, image_lens: Array
) -> Array:
    """pairs + Σ_b ds, the transpose of `_bias_block`; one sequence after the other where each has its own offset."""
    ds = jnp.where(_inside(position, j, image_lens), ds, 0.0)
    column = s * call.block_s
    if call.at_origin:
        return _add_at(pairs, ds.sum(0), (0, t * call.block_t, column))
    rows = _first_rows(call, pairs, position)
    return lax.fori_loop(0, len(rows), lambda b, pairs: _add_at(pairs, ds[b], (0, rows[b], column)), pairs)


def _first_rows(call: _Call, expanded: Array, position: Array) -> Array:
    """int32[B]: where a block of queries begins in the expanded table; past the image, in its zero rows."""
    return jnp.minimum(position[:, 0], expanded.shape[1] - call.block_t)


def _inside(position: Array, j: Array, image_lens: Array) -> Array:
    """bool[B, 1, T, S]: both are patches."""
    return ((position < image_lens[:, None])[:, :, None] & (j < image_lens[:, None])[:, None, :])[:, None]
