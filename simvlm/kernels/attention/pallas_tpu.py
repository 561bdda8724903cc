"""`prefix_attention` for TPUs, fused by Pallas (Mosaic), forward and backward.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

Kernels walk a list of the tiles of 128 × 128 pairs that some query sees (pallas_tpu_tiles.py) on rows as storage has
them, [rows, N·H]; a step takes eight heads or so. Padded storage whose lengths are multiples of 128 is read and written
in place; the rest is laid at block edges by one gather of rows, and back by another. The table is expanded once a call
to [N, I, I]; each pass of a kernel fetches its tiles once for the whole batch, and dq's adds dS to tiles of the same
shape, whose reduction to the table is the transpose of the expansion: no scatter, sums in a fixed order. Saved for
backward: out and lse. Differentiable once, in reverse.

Limits: float32 and bfloat16; a table needs a layout without q_offsets and an expansion that fits VMEM, which before v5
eight heads of 80 in float32 do not. TPUs before v4 multiply float32 alone in a kernel: there bfloat16 is widened to
float32 in VMEM, to the same products.

Which TPU it is follows from the devices of the current mesh, else of the default backend. Compiling ahead of time,
trace under `jax.set_mesh(mesh)` of the topology's devices; `jax.shard_map` says so itself. JAX splits no kernel over
devices: on several, call this within `jax.shard_map(…, check_vma=False)`, each device with its own rows and layout. On
other backends the kernels run under `pltpu.force_tpu_interpret_mode()` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from simvlm.kernels.attention import jax_op
from simvlm.kernels.attention import pallas_tpu_tiles as storage
from simvlm.kernels.attention.jax_op import Wanted
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.attention.pallas_tpu_kernels import (
    Shape,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    minor_of,
    owner_of,
)
from simvlm.kernels.attention.pallas_tpu_tiles import BLOCK, K_BLOCKS, Q_BLOCKS, Rows, ceil_div

Array = Any  # jax arrays and tracers

_SCRATCH_BYTES = 64 * 2**20
_HEADS = 8
"""a step, at most: enough work to hide a step's overhead; more would only be more code."""
_VMEM_BYTES = 16 * 2**20
"""of a kernel: all there is up to v4, and what the compiler grants unasked later."""


def unavailable() -> str | None:
    if not hasattr(pltpu, "is_tpu_device"):
        return f"jax must be 0.10 or newer, got {jax.__version__}"
    return None if _interprets() or pltpu.is_tpu_device() else _NO_TPU


_NO_TPU = (
    "neither the default backend nor the current mesh is a TPU (elsewhere the kernels run under "
    "pltpu.force_tpu_interpret_mode(); ahead of time, under jax.set_mesh)"
)


def unsupported(q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None) -> str | None:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q must be float32 or bfloat16, got {q.dtype}"
    call = _call(q, k, layout, rel_bias is not None, 1.0)
    if call.image_grid is not None:
        if not layout.at_origin:
            return "rel_bias must be None with a layout that has q_offsets: the table is tiled for queries from key 0"
        if 4 * q.shape[-2] * (call.image_blocks * BLOCK) ** 2 > _SCRATCH_BYTES:
            return f"image_grid {layout.image_grid} is too large: the expanded table exceeds {_SCRATCH_BYTES} bytes"
    if call.heads == 0:
        return (
            f"{q.shape[-2]} heads of {q.shape[-1]} in {q.dtype} with image_grid {call.image_grid} do not fit "
            f"{_VMEM_BYTES} bytes of VMEM"
        )
    if max(call.queries.most, call.keys.most) >> storage.MINOR_BITS:
        return f"lengths must be below {BLOCK << storage.MINOR_BITS}"
    listed = 4 * (storage.most_tiles(call.queries, call.keys) + 7 * layout.batch)
    if not _interprets() and 2 * listed > pltpu.get_tpu_info().smem_capacity_bytes:
        return f"the batch is too large: its list of tiles takes {listed} bytes, more than half of the scalar memory"
    return None


def forward(
    q: Array, k: Array, v: Array, layout: PrefixLayout, rel_bias: Array | None, scale: float
) -> tuple[Array, Array]:
    """(out, lse) as `prefix_attention` documents them; differentiable once, in reverse."""
    if layout.batch == 0 or q.size == 0 or k.size == 0:
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    call = _call(q, k, layout, rel_bias is not None, scale)
    return _attention(call, q, k, v, rel_bias, jnp.asarray(layout.bounds, jnp.int32))


def _interprets() -> bool:
    """Whether `pltpu.force_tpu_interpret_mode` is on; JAX has no public question for it."""
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def _widens(dtype: Any) -> bool:
    """Whether products take bfloat16 operands as float32: before v4 a kernel multiplies nothing else."""
    return dtype == jnp.bfloat16 and not _interprets() and pltpu.get_tpu_info().generation < 4


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call; `heads` is how many a step takes, a divisor of the q's."""

    queries: Rows
    keys: Rows
    image_grid: tuple[int, int] | None
    heads: int
    keys_ascend: bool
    widened: bool
    scale: float

    @property
    def image_blocks(self) -> int:
        return ceil_div(math.prod(self.image_grid), BLOCK) if self.image_grid else 0

    def expanded(self, table: Array, flipped: bool = False) -> Array:
        assert self.image_grid is not None, "a call with a table has a grid"
        return storage.expanded(table, self.image_grid, flipped)

    def shape(self, q: Array, batch: int) -> Shape:
        patches = math.prod(self.image_grid) if self.image_grid else 0
        return Shape(batch, self.heads, q.shape[-1], q.dtype, self.widened, self.scale, patches)


def _call(q: Array, k: Array, layout: PrefixLayout, has_table: bool, scale: float) -> _Call:
    batch = layout.batch
    if layout.padded_shape is not None:
        queries, keys = (Rows.padded(batch, length) for length in layout.padded_shape)
    else:
        queries = Rows.packed(batch, q.shape[0], layout.max_q_len, True)
        keys = Rows.packed(batch, k.shape[0], layout.max_k_len, layout.keys_ascend)
    grid = layout.image_grid if has_table else None
    call = _Call(queries, keys, grid, 0, layout.keys_ascend, _widens(q.dtype), scale)
    return dataclasses.replace(
        call, heads=_heads(q.shape[-2], q.shape[-1], q.dtype.itemsize, call.image_blocks, _spills(q.dtype))
    )


def _spills(dtype: Any) -> bool:
    """Whether the compiler keeps parts of float32 products in VMEM: seen on a v3, 17.3 MB for eight heads of 80."""
    return dtype == jnp.float32 and not _interprets() and pltpu.get_tpu_info().generation < 5


def _heads(heads: int, head_dim: int, itemsize: int, image_blocks: int, spills: bool = False) -> int:
    """How many heads a step takes: whole registers of 128 lanes, or all heads; 0 if no choice fits VMEM.

    The backward pass for queries takes most: five blocks of rows in two buffers, one sum, the statistics, and the
    bias and pairs of a block of queries with all patches.
    """
    fitting = []
    for some in range(1, heads + 1):
        lanes = ceil_div(some * head_dim, BLOCK) * BLOCK
        whole = some == heads or some * head_dim % BLOCK == 0
        tile = 4 * BLOCK * BLOCK
        taken = BLOCK * lanes * (2 * 5 * itemsize + 4) + 4 * tile + some * tile * (2 + 4 * image_blocks + 16 * spills)
        if heads % some == 0 and whole and taken <= _VMEM_BYTES * 7 // 8:
            fitting.append(some)
    few = [some for some in fitting if some <= _HEADS]
    return max(few) if few else min(fitting, default=0)


def _forward(call: _Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> tuple[Array, Array]:
    q_starts, q_lens = bounds[0], bounds[1]
    rows = _Aligned(call, q, bounds)
    shape = call.shape(q, bounds.shape[1])
    walk = _Walk(call, shape, rows.bounds, rows.groups, by_keys=False)
    bias = [] if table is None else [call.expanded(table)]
    out, lse = walk(
        forward_kernel,
        [rows.queries(q), rows.keys(k), rows.keys(v), *bias],
        [walk.queries, walk.keys, walk.keys, *(walk.table for _ in bias)],
        [walk.like(walk.queries, q.dtype), walk.like(walk.columns, jnp.float32)],
        [walk.queries, walk.columns],
        [walk.sums, *[pltpu.VMEM((shape.heads, BLOCK, 1), jnp.float32)] * 2],
    )
    lse = lse.transpose(1, 0, 2).reshape(lse.shape[1], -1)
    out = storage.store(call.queries, out, q_starts, q_lens, 0.0)
    lse = storage.store(call.queries, lse, q_starts, q_lens, -jnp.inf)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


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
    """(dq, dk, dv, dtable): p = exp(score - lse), ds = p · (<dout, v> - delta), delta = <dout, out> - dlse."""
    q_starts, q_lens, k_starts, k_lens = bounds[:4]
    rows = _Aligned(call, q, bounds)
    shape = call.shape(q, bounds.shape[1])
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # a query that sees no key has p = 0
    operands = [rows.queries(q), rows.keys(k), rows.keys(v), rows.queries(dout)]
    columns = [rows.columns(lse), rows.columns(delta)]

    walk = _Walk(call, shape, rows.bounds, rows.groups, by_keys=False)
    bias = [] if table is None else [call.expanded(table)]
    pairs = [walk.table] if wanted.table else []
    dq, *pairs_sum = walk(
        dq_kernel,
        [*operands, *columns, *bias],
        [walk.queries, walk.keys, walk.keys, walk.queries, *[walk.columns] * 2, *(walk.table for _ in bias)],
        [walk.like(walk.queries, q.dtype), *(jax.ShapeDtypeStruct(bias[0].shape, jnp.float32) for _ in pairs)],
        [walk.queries, *pairs],
        [walk.sums],
    )
    dtable = None
    if table is not None and wanted.table:
        # Blocks of queries that no sequence has were not visited.
        met = jnp.arange(call.image_blocks) * BLOCK < q_lens.max()
        pairs_sum = jnp.where(met.reshape(-1, 1, 1, 1, 1), pairs_sum[0], 0.0)
        _, reduce = jax.vjp(call.expanded, table.astype(jnp.float32))
        dtable = reduce(pairs_sum)[0].astype(table.dtype)

    walk = _Walk(call, shape, rows.bounds, rows.groups, by_keys=True)
    bias = [] if table is None else [call.expanded(table, flipped=True)]
    dk, dv = walk(
        dkv_kernel,
        [*operands, *(x.swapaxes(1, 2) for x in columns), *bias],
        [walk.queries, walk.keys, walk.keys, walk.queries, *[walk.rows] * 2, *(walk.table for _ in bias)],
        [walk.like(walk.keys, k.dtype)] * 2,
        [walk.keys] * 2,
        [walk.sums] * 2,
    )
    dq = storage.store(call.queries, dq, q_starts, q_lens, 0.0).reshape(q.shape)
    dk, dv = (storage.store(call.keys, x, k_starts, k_lens, 0.0).reshape(k.shape) for x in (dk, dv))
    return dq, dk, dv, dtable


_attention = jax_op.differentiable("pallas", _forward, _backward)


class _Aligned:
    """Storage as kernels read it: `queries`, `keys` [rows, N·H], `columns` [groups, rows, heads of a group]."""

    def __init__(self, call: _Call, q: Array, bounds: Array) -> None:
        self.call = call
        self.groups = q.shape[-2] // call.heads
        self.q_range, self.k_range = (bounds[0], bounds[1]), (bounds[2], bounds[3])
        self.bounds = bounds.at[Q_BLOCKS].set(storage.first_blocks(call.queries, bounds[1]))
        self.bounds = self.bounds.at[K_BLOCKS].set(storage.first_blocks(call.keys, bounds[3]))

    def queries(self, x: Array) -> Array:
        return storage.align(self.call.queries, self._flat(x), *self.q_range)

    def keys(self, x: Array) -> Array:
        return storage.align(self.call.keys, self._flat(x), *self.k_range)

    def columns(self, x: Array) -> Array:
        x = storage.align(self.call.queries, x.reshape(-1, x.shape[-1]), *self.q_range)
        return x.reshape(len(x), self.groups, -1).swapaxes(0, 1)

    def _flat(self, x: Array) -> Array:
        return x.reshape(-1, x.shape[-2] * x.shape[-1])


class _Walk:
    """A kernel's grid, head groups × listed tiles, and its blocks."""

    def __init__(self, call: _Call, shape: Shape, bounds: Array, groups: int, by_keys: bool) -> None:
        self.call, self.shape, self.groups, self.by_keys = call, shape, groups, by_keys
        self.bounds = bounds.reshape(-1)
        self.tiles, self.total = storage.tiles(call.queries, call.keys, bounds, by_keys)
        lanes = shape.heads * shape.head_dim
        self.sums = pltpu.VMEM((BLOCK, lanes), jnp.float32)
        self.queries = pl.BlockSpec((BLOCK, lanes), lambda g, w, *lists: (self._block(Q_BLOCKS, w, *lists), g))
        self.keys = pl.BlockSpec((BLOCK, lanes), lambda g, w, *lists: (self._block(K_BLOCKS, w, *lists), g))
        self.columns = pl.BlockSpec(
            (1, BLOCK, shape.heads), lambda g, w, *lists: (g, self._block(Q_BLOCKS, w, *lists), 0)
        )
        self.rows = pl.BlockSpec((1, shape.heads, BLOCK), lambda g, w, *lists: (g, 0, self._block(Q_BLOCKS, w, *lists)))
        self.table = pl.BlockSpec(
            (1, shape.image_blocks, shape.heads, BLOCK, BLOCK),
            lambda g, w, tiles, _: (jnp.minimum(self._outer(tiles, w), shape.image_blocks - 1), 0, g, 0, 0),
        )

    def like(self, spec: pl.BlockSpec, dtype: Any) -> jax.ShapeDtypeStruct:
        """The shape of the whole array that `spec` cuts."""
        lanes = self.groups * self.shape.heads * self.shape.head_dim
        rows = (self.call.keys if spec is self.keys else self.call.queries).blocks * BLOCK
        return jax.ShapeDtypeStruct(
            (self.groups, rows, self.shape.heads) if spec is self.columns else (rows, lanes), dtype
        )

    def __call__(
        self, kernel: Any, operands: Any, in_specs: Any, out_shape: Any, out_specs: Any, scratch_shapes: Any
    ) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, self.shape),
            out_shape=out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.groups, self.total),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch_shapes,
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name=f"prefix_attention_{kernel.__name__.removesuffix('_kernel')}",
        )(self.tiles, self.bounds, *operands)

    def _outer(self, tiles: Any, step: Any) -> Any:
        return lax.div(owner_of(tiles, step), self.shape.batch)

    def _block(self, first: int, step: Any, tiles: Any, bounds: Any) -> Any:
        """Of aligned rows: queries' (`first` is Q_BLOCKS) or keys', those of the tile of grid step `step`."""
        sequence = lax.rem(owner_of(tiles, step), self.shape.batch)
        owned = self._outer(tiles, step)
        place = owned if (first == K_BLOCKS) == self.by_keys else minor_of(tiles, step)
        last = (self.call.keys if first == K_BLOCKS else self.call.queries).blocks - 1
        return jnp.minimum(bounds[first * self.shape.batch + sequence] + place, last)
