"""The passes of `prefix_attention` in plain JAX over one group of heads, in blocks cut from storage where they lie.

Forward, each block of queries goes over its keys twice: for the highest score of each query, then for the sums. TPU v2
and v3 have no scratchpad that XLA manages and write every intermediate array to HBM; this way no block of float32
scores is one, only p is, in v's dtype, for one product more. Backward, each block of keys goes over its queries, and dq
is summed in storage. dS is rounded to q's dtype once, before all three of its uses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from simvlm.kernels.attention.jax_op import Wanted
from simvlm.kernels.attention.xla_table import Spread
from simvlm.kernels.manual_axes import axes_of, varying

Array = Any  # jax arrays and tracers

BLOCK_T, BLOCK_S = 256, 1024
SCRATCH_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20
# Finite, because -inf - (-inf) is NaN where a query has seen nothing yet, and below every score that means anything.
_NO_SCORE = -1.0e30


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one call."""

    block_t: int
    block_s: int
    spread: Spread | None
    keys_ascend: bool
    scale: float

    def group(self, heads: int) -> int:
        """How many heads run at once: the most that divide `heads` and keep within the limits of both scratches."""
        block = 4 * self.block_t * self.block_s
        spread = self.spread.bytes_a_head if self.spread else 0
        most = min(_BLOCK_BYTES // block, SCRATCH_BYTES // spread if spread else heads)
        return max(group for group in range(1, heads + 1) if heads % group == 0 and group <= max(most, 1))


class _Sequence(NamedTuple):
    """One sequence's integers, as scalars, in the order of `PrefixLayout.bounds`."""

    q_start: Array
    q_len: Array
    k_start: Array
    k_len: Array
    prefix_len: Array
    q_offset: Array
    image_len: Array

    @classmethod
    def of(cls, bounds: Array, b: Array) -> _Sequence:
        return cls(*lax.dynamic_index_in_dim(bounds, b, 1, keepdims=False))

    def limits(self, i: Array) -> Array:
        """int32, like i: how many leading keys query i sees; none where there is no query i."""
        seen = jnp.maximum(self.prefix_len, self.q_offset + i + 1)
        return jnp.where(i < self.q_len, jnp.minimum(self.k_len, seen), 0)


def forward_heads(call: Call, bounds: Array, q: Array, k: Array, v: Array, table: Array | None) -> tuple[Array, Array]:
    """(out, lse) of q[G, R, H], k and v[G, R', H], table[G, 2Gh-1, 2Gw-1]."""
    heads, rows, head_dim = q.shape
    q, k, v = _padded(q, call.block_t), _padded(k, call.block_s), _padded(v, call.block_s)
    spread = call.spread.of(table) if call.spread else None

    def sequence(b: Array, stored: Any) -> Any:
        own = _Sequence.of(bounds, b)

        def query_block(t: Array, stored: Any) -> Any:
            row = own.q_start + t * call.block_t
            i = t * call.block_t + jnp.arange(call.block_t)
            position = own.q_offset + t * call.block_t
            q_block = _cut(q, row, call.block_t)
            limit = own.limits(i)

            def scores(s: Array, biased: bool) -> Array:
                first = s * call.block_s
                found = _products(q_block, _cut(k, own.k_start + first, call.block_s)) * call.scale
                if biased and call.spread:
                    found += call.spread.block(spread, position, first)
                return jnp.where(first + jnp.arange(call.block_s) < limit[:, None], found, _NO_SCORE)

            def highest(s: Array, top: Array, biased: bool) -> Array:
                return jnp.maximum(top, scores(s, biased).max(-1))

            def attend(s: Array, state: Any, biased: bool) -> Any:
                mixed, total = state
                j = s * call.block_s + jnp.arange(call.block_s)
                v_block = _owned(_cut(v, own.k_start + s * call.block_s, call.block_s), j < own.k_len)
                p = jnp.exp(scores(s, biased) - top[..., None])
                return mixed + _mix(p.astype(v.dtype), v_block), total + p.sum(-1)

            patch_keys = jnp.where(position < own.image_len, jnp.minimum(own.image_len, limit.max()), 0)
            ends = _ceil_div(patch_keys, call.block_s), _ceil_div(limit.max(), call.block_s)
            zeros = _zeros((heads, call.block_t), q)
            top = _two_loops(call, 0, *ends, highest, zeros + _NO_SCORE)
            top = jnp.where(limit > 0, top, 0.0)  # else a query that sees no key would have p = 1 everywhere
            state = _zeros((heads, call.block_t, head_dim), q), zeros
            mixed, total = _two_loops(call, 0, *ends, attend, state)
            seen = total != 0
            total = jnp.where(seen, total, 1.0)
            out = (mixed / total[..., None]).astype(q.dtype)
            lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
            return _put(stored[0], _owned(out, i < own.q_len), row), _put(stored[1], lse, row)

        return lax.fori_loop(0, _ceil_div(own.q_len, call.block_t), query_block, stored)

    lse = _zeros(q.shape[:2], q) - jnp.inf
    out, lse = lax.fori_loop(0, bounds.shape[1], sequence, (_zeros(q.shape, q, q.dtype), lse))
    return out[:, :rows], lse[:, :rows]


def backward_heads(
    call: Call,
    bounds: Array,
    q: Array,
    k: Array,
    v: Array,
    table: Array | None,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    wanted: Wanted,
) -> tuple[Array | None, ...]:
    """(dq, dk, dv, dtable): p = exp(score - lse), ds = p · (<dout, v> - delta), delta = <dout, out> - dlse."""
    rows, key_rows = q.shape[1], k.shape[1]
    q, dout, lse, delta = (_padded(x, call.block_t) for x in (q, dout, lse, delta))
    k, v = _padded(k, call.block_s), _padded(v, call.block_s)
    spread = call.spread.of(table) if call.spread else None

    def sequence(b: Array, stored: Any) -> Any:
        own = _Sequence.of(bounds, b)
        q_end = _ceil_div(own.q_len, call.block_t)

        def key_block(s: Array, stored: Any) -> Any:
            dq, dk, dv, dspread = stored
            first = s * call.block_s
            row = own.k_start + first
            j = first + jnp.arange(call.block_s)
            k_block, v_block = (_owned(_cut(x, row, call.block_s), j < own.k_len) for x in (k, v))

            def attend(t: Array, state: Any, biased: bool) -> Any:
                dq, dk_block, dv_block, dspread = state
                row = own.q_start + t * call.block_t
                i = t * call.block_t + jnp.arange(call.block_t)
                position = own.q_offset + t * call.block_t
                limit = own.limits(i)
                q_block, dout_block = (_owned(_cut(x, row, call.block_t), i < own.q_len) for x in (q, dout))
                lse_block, delta_block = (_cut(x, row, call.block_t) for x in (lse, delta))
                lse_block = jnp.where((limit > 0) & (lse_block > -jnp.inf), lse_block, jnp.inf)
                delta_block = jnp.where(i < own.q_len, delta_block, 0.0)
                scores = _products(q_block, k_block) * call.scale
                if biased and call.spread:
                    scores += call.spread.block(spread, position, first)
                p = jnp.where(j < limit[:, None], jnp.exp(scores - lse_block[..., None]), 0.0)
                ds = (p * (_products(dout_block, v_block) - delta_block[..., None])).astype(q.dtype)
                # Else XLA would keep dS in float32 too, for the table's gradient alone.
                ds = lax.optimization_barrier(ds)
                if biased and call.spread and dspread is not None:
                    dspread = call.spread.add(dspread, ds, position, first)
                if dq is not None:
                    dq = _put(dq, _cut(dq, row, call.block_t) + _mix(ds, k_block), row)
                if dk_block is not None:
                    dk_block += _mix(ds.mT, q_block)
                    dv_block += _mix(p.astype(v.dtype).mT, dout_block)
                return dq, dk_block, dv_block, dspread

            zeros = _zeros(k_block.shape, k) if (wanted.k or wanted.v) else None
            # Key `first` is seen from query first - q_offset on, and by all inside the prefix.
            begin = jnp.where(first < own.prefix_len, 0, jnp.maximum(first - own.q_offset, 0)) // call.block_t
            patch_queries = jnp.where(first < own.image_len, own.image_len - own.q_offset, 0)
            ends = _ceil_div(jnp.clip(patch_queries, 0, own.q_len), call.block_t), q_end
            dq, dk_block, dv_block, dspread = _two_loops(call, begin, *ends, attend, (dq, zeros, zeros, dspread))
            if wanted.k or wanted.v:
                dk = _put(dk, (dk_block * call.scale).astype(k.dtype), row)
                dv = _put(dv, dv_block.astype(v.dtype), row)
            return dq, dk, dv, dspread

        return lax.fori_loop(0, _ceil_div(own.k_len, call.block_s), key_block, stored)

    dkv = _zeros(k.shape, k, k.dtype) if (wanted.k or wanted.v) else None
    dspread = _zeros(spread.shape, q) if spread is not None and wanted.table else None
    stored = _zeros(q.shape, q) if wanted.q else None, dkv, dkv, dspread
    dq, dk, dv, dspread = lax.fori_loop(0, bounds.shape[1], sequence, stored)
    dq = None if dq is None else (dq[:, :rows] * call.scale).astype(q.dtype)
    dk, dv = (None if x is None else x[:, :key_rows] for x in (dk, dv))
    return dq, dk, dv, call.spread.dtable(dspread, table) if call.spread and dspread is not None else None


def _two_loops(call: Call, begin: Array, biased: Array, end: Array, body: Any, state: Any) -> Any:
    """body(index, state, is_biased) over begin … end, the indices below `biased` with the table."""
    if call.spread is not None:
        biased = jnp.clip(biased, begin, jnp.maximum(begin, end))
        state = lax.fori_loop(begin, biased, functools.partial(body, biased=True), state)
        begin = biased
    return lax.fori_loop(begin, end, functools.partial(body, biased=False), state)


def _products(a: Array, b: Array) -> Array:
    """float32[G, T, S]: the products of the rows of a and b."""
    return jnp.einsum("gth,gsh->gts", a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _mix(weights: Array, rows: Array) -> Array:
    """float32[G, T, H]: sums of rows."""
    return jnp.einsum("gts,gsh->gth", weights, rows, precision=_precision(rows), preferred_element_type=jnp.float32)


def _precision(x: Array) -> lax.Precision | None:
    # A TPU's default for float32 is one bfloat16 product.
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _zeros(shape: tuple[int, ...], like: Array, dtype: Any = jnp.float32) -> Array:
    """Zeros that vary over the mesh axes that `like` varies over, as a loop's carry must inside shard_map."""
    return varying(jnp.zeros(shape, dtype), axes_of(like))


def _padded(x: Array, block: int) -> Array:
    """A block of zeros more, so that no block reaches past the end (`dynamic_slice` would move it)."""
    return jnp.pad(x, [(0, 0), (0, block), *[(0, 0)] * (x.ndim - 2)])


def _cut(x: Array, row: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, row, block, 1)


def _put(x: Array, part: Array, row: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, row, 1)


def _owned(x: Array, owned: Array) -> Array:
    """x[G, T, H] with zeros for rows that are not the sequence's, whatever storage holds there."""
    return jnp.where(owned[:, None], x, jnp.zeros((), x.dtype))


def _ceil_div(n: Array, block: int) -> Array:
    return (n + block - 1) // block
