"""`prefix_attention` for jax arrays on the CPU through the compiled module, forward and backward, as XLA custom calls.

The kernels are in csrc/attention_*.cc, their handlers in csrc/xla_door.cc. The layout's integers are an operand: one
compiled program serves every layout of the same shapes, and a layout that leaves the storage is an error when the
program runs. Saved for backward: q, k, v, out and lse. A gradient that nobody asks for is not computed. Differentiable
once, in reverse; jvp and jacfwd raise JAX's own error about functions with a custom vjp. Under vmap the elements of the
mapped dimension follow each other, each with all threads. Under a sharded jit XLA gathers what a custom call reads;
shard_map calls it on each device's own part. Limits: float32, bfloat16, float16; the host only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from simvlm.kernels import cpp_xla
from simvlm.kernels.attention import jax_op
from simvlm.kernels.attention.jax_op import Wanted
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.cpp_xla import NOTHING, Array
from simvlm.kernels.manual_axes import varying_alike


def unavailable() -> str | None:
    return cpp_xla.unavailable()


def unsupported(q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None) -> str | None:
    return cpp_xla.unsupported(q)


def forward(
    q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None, scale: float
) -> tuple[Array, Array]:
    """(out, lse) as `prefix_attention` documents them; differentiable once, in reverse."""
    if layout.batch == 0 or q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    call = _Call(layout.is_padded, layout.image_grid or (0, 0), layout.keys_ascend, scale)
    # The kernels read float32; this cast rounds the table's gradient once.
    table = None if rel_bias is None else rel_bias.astype(jnp.float32)
    return _attention(call, *varying_alike(q, k, v, table, jnp.asarray(layout.bounds, jnp.int32)))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call."""

    padded: bool
    image_grid: tuple[int, int]
    keys_ascend: bool
    scale: float

    @property
    def attributes(self) -> dict[str, Any]:
        height, width = self.image_grid
        return {"padded": self.padded, "grid_height": height, "grid_width": width, "scale": np.float32(self.scale)}


def _forward(call: _Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> tuple[Array, Array]:
    results = (q.shape, q.dtype), (q.shape[:-1], jnp.float32)
    out, lse = cpp_xla.call("attention_forward", results, q, k, v, table, bounds, **call.attributes)
    return out, lse


def _backward(
    call: _Call,
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
    """(dq, dk, dv, dtable), None where not wanted."""
    asked = (wanted.q, wanted.k, wanted.v, wanted.table)
    results = [(x.shape, x.dtype) if want else NOTHING for x, want in zip((q, k, v, table), asked, strict=True)]
    operands = (q, k, v, out, dout, lse, dlse, table, bounds)
    grads = cpp_xla.call("attention_backward", results, *operands, **call.attributes)
    return tuple(grad if want else None for grad, want in zip(grads, asked, strict=True))


_attention = jax_op.differentiable("cpp", _forward, _backward)
