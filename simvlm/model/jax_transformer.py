"""The two stacks in JAX: pre-LayerNorm transformer layers over packed rows, attention by `prefix_attention`.

Arrays have a leading axis U of units: packed batches of equal static shapes, one to a device of a mesh (one in all
without a mesh). The layers of a stack are one module whose parameters have a leading axis, depth; a scan goes over it,
so that a deep model compiles as fast as a shallow one.

Weights are those of the canonical files, heads apart: [3, N, H, D] where the file says [3D, D]; no transposition.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from simvlm.kernels import OPS, PrefixLayout, prefix_attention

Array = Any  # jax arrays and tracers

EPS = 1e-6
INIT_STD = 0.02
UNITS = ("data", "fsdp")
"""The axes of a mesh that units are spread over; the third, "tensor", spreads heads and the MLPs' hidden width."""
AXES = (*UNITS, "tensor")
REMAT = ("none", "layer", "dots")
"""What the backward pass computes again: nothing; each layer and block from its input; all but matrix products."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model runs, which changes no result but by rounding.

    Attributes:
        impl: the kernels by name, None for the best that takes each call.
        dtype: of products and activations; the residual stream, norms, tables and positions stay float32.
        mesh: with the axes `AXES`, or None.
        remat: one of `REMAT`.
        scan: layers in a loop (compiled once), or one after the other.
    """

    impl: str | None = None
    dtype: Any = jnp.float32
    mesh: Mesh | None = None
    remat: str = "none"
    scan: bool = True

    def impl_of(self, op: str) -> str | None:
        """`impl` where the op has an implementation of that name; else None, its best, or XLA's beside Pallas.

        Where a program is compiled for TPUs on another machine, the best there would be that machine's.
        """
        if any(row.name == self.impl and row.family == "jax" for row in OPS[op]):
            return self.impl
        return "xla" if self.impl == "pallas" else None

    def on_units(self, x: Array) -> Array:
        """x[U, …], its units spread over the mesh and the rest whole."""
        if self.mesh is None:
            return x
        spec = P(UNITS, *[None] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(self.mesh, spec))

    def on_images(self, x: Array) -> Array:
        """x[B, …], the pictures of all units spread over the whole mesh, where they divide it."""
        if self.mesh is None or x.shape[0] % self.mesh.size:
            return x
        spec = P(AXES, *[None] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(self.mesh, spec))

    def checkpointed(self, function: Any) -> Any:
        if self.remat == "none":
            return function
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan)

    def over_depth(self, function: Any, x: Any, stacked: Any) -> tuple[Any, Any]:
        """x, ys of x, y = function(x, slice) over the leading axis of `stacked`'s arrays."""
        body = self.checkpointed(function)
        if self.scan:
            return jax.lax.scan(body, x, stacked)
        ys = []
        for i in range(len(jax.tree.leaves(stacked)[0])):
            x, y = body(x, jax.tree.map(lambda a, i=i: a[i], stacked))
            ys.append(y)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)


def per_unit(execution: Execution, function: Any, specs: tuple[Any, ...], out_spec: Any, *arrays: Array) -> Array:
    """Stacks function(arrays of one unit) over the units, each on the device that holds it.

    Args:
        function: of arrays without the axis U, or whole where the spec is not by units.
        specs: of each array, first entry `UNITS` where it has the axis U; out_spec: of the result.
    """

    def local(*arrays: Array) -> Array:
        of_units = [bool(spec) and spec[0] == UNITS for spec in specs]
        count = next(len(x) for x, has in zip(arrays, of_units, strict=True) if has)
        return jnp.stack(
            [
                function(*(x[unit] if has else x for x, has in zip(arrays, of_units, strict=True)))
                for unit in range(count)
            ]
        )

    if execution.mesh is None:
        return local(*arrays)
    # The kernels are no collectives' business: inside, every device sees its own units and heads alone.
    mapped = jax.shard_map(local, mesh=execution.mesh, in_specs=specs, out_specs=out_spec, check_vma=False)
    return mapped(*arrays)


_ROWS = P(UNITS, None, "tensor", None)


def attend(
    execution: Execution, q: Array, k: Array, v: Array, layout: PrefixLayout, table: Array | None = None
) -> Array:
    """`prefix_attention` of every unit: q[U, R, N, H], k and v[U, R', N, H], the layout's bounds [U, 7, B]."""

    def one(q: Array, k: Array, v: Array, bounds: Array, *table: Array) -> Array:
        own = dataclasses.replace(layout, bounds=bounds)
        return prefix_attention(
            q, k, v, own, rel_bias=table[0] if table else None, impl=execution.impl_of("prefix_attention")
        )

    specs, arrays = [_ROWS, _ROWS, _ROWS, P(UNITS, None, None)], [q, k, v, layout.bounds]
    if table is not None:
        specs.append(P("tensor", None, None))
        arrays.append(table)
    return per_unit(execution, one, tuple(specs), _ROWS, *arrays)


class Linear(nnx.Module):
    """weight[…outputs, …inputs], bias[…outputs]; `depth` of them where it is given."""

    def __init__(
        self,
        outputs: tuple[int, ...],
        inputs: tuple[int, ...],
        *,
        std: float,
        rngs: nnx.Rngs,
        depth: tuple[int, ...] = (),
    ) -> None:
        self.inputs = len(inputs)
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (*depth, *outputs, *inputs)))
        self.bias = nnx.Param(jnp.zeros((*depth, *outputs)))

    def __call__(self, x: Array, dtype: Any) -> Array:
        weight, axes = self.weight[...].astype(dtype), self.inputs
        contract = (range(x.ndim - axes, x.ndim), range(weight.ndim - axes, weight.ndim))
        y = jax.lax.dot_general(
            x.astype(dtype),
            weight,
            (contract, ((), ())),
            precision=precision(dtype),
            preferred_element_type=jnp.float32,
        )
        return (y + self.bias[...]).astype(dtype)


def precision(dtype: Any) -> jax.lax.Precision | None:
    """A TPU's default for float32 is one bfloat16 product."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class LayerNorm(nnx.Module):
    """Over the last axis, in float32."""

    def __init__(self, width: int, depth: tuple[int, ...] = ()) -> None:
        self.weight = nnx.Param(jnp.ones((*depth, width)))
        self.bias = nnx.Param(jnp.zeros((*depth, width)))

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + EPS) * self.weight[...] + self.bias[...]


class Attention(nnx.Module):
    """Self-attention with one projection for q, k and v, and a 2D relative table where `table_shape` is given."""

    def __init__(self, width: int, heads: tuple[int, int], table_shape: tuple[int, ...] | None, **options: Any) -> None:
        self.qkv = Linear((3, *heads), (width,), **options)
        self.out = Linear((width,), heads, **options)
        rel_bias = None
        if table_shape is not None:
            shape = (*options["depth"], *table_shape)
            rel_bias = nnx.Param(INIT_STD * jax.random.normal(options["rngs"].params(), shape))
        self.rel_bias = rel_bias

    def __call__(self, x: Array, layout: PrefixLayout, execution: Execution) -> tuple[Array, tuple[Array, Array]]:
        """The attention's share of x, and its keys and values."""
        qkv = self.qkv(x, execution.dtype)
        q, k, v = (qkv[:, :, part] for part in range(3))
        table = None if self.rel_bias is None else self.rel_bias[...]
        return self.out(attend(execution, q, k, v, layout, table), execution.dtype), (k, v)


class CrossAttention(nnx.Module):
    """Attention of decoder rows over encoder rows."""

    def __init__(self, width: int, heads: tuple[int, int], **options: Any) -> None:
        self.q = Linear(heads, (width,), **options)
        self.kv = Linear((2, *heads), (width,), **options)
        self.out = Linear((width,), heads, **options)

    def __call__(self, x: Array, states: Array, layout: PrefixLayout, execution: Execution) -> Array:
        q, kv = self.q(x, execution.dtype), self.kv(states, execution.dtype)
        return self.out(attend(execution, q, kv[:, :, 0], kv[:, :, 1], layout), execution.dtype)


class MLP(nnx.Module):
    def __init__(self, width: int, mlp_dim: int, **options: Any) -> None:
        self.up = Linear((mlp_dim,), (width,), **options)
        self.down = Linear((width,), (mlp_dim,), **options)

    def __call__(self, x: Array, execution: Execution) -> Array:
        hidden = jax.nn.gelu(self.up(x, execution.dtype), approximate=False)
        return self.down(hidden, execution.dtype)


class Layer(nnx.Module):
    """x + attention(norm(x)), then + cross(norm(x)) in a decoder that has an encoder, then + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        table_shape: tuple[int, ...] | None,
        cross: bool,
        depth: int,
        std: float,
        rngs: nnx.Rngs,
    ) -> None:
        heads = (num_heads, width // num_heads)
        options: dict[str, Any] = {"depth": (depth,), "std": std, "rngs": rngs}
        self.attention_norm = LayerNorm(width, (depth,))
        self.attention = Attention(width, heads, table_shape, **options)
        self.cross_norm = LayerNorm(width, (depth,)) if cross else None
        self.cross = CrossAttention(width, heads, **options) if cross else None
        self.mlp_norm = LayerNorm(width, (depth,))
        self.mlp = MLP(width, mlp_dim, **options)

    def __call__(
        self,
        x: Array,
        layout: PrefixLayout,
        execution: Execution,
        states: Array | None = None,
        cross_layout: PrefixLayout | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """The next x, and the self-attention's keys and values."""
        share, memory = self.attention(self.attention_norm(x), layout, execution)
        x = x + share
        if self.cross is not None and self.cross_norm is not None:
            assert states is not None
            assert cross_layout is not None
            x = x + self.cross(self.cross_norm(x), states, cross_layout, execution)
        return execution.on_units(x + self.mlp(self.mlp_norm(x), execution)), memory


class Stack(nnx.Module):
    """Layers and the final LayerNorm."""

    def __init__(self, depth: int, width: int, *args: Any, **options: Any) -> None:
        self.layers = Layer(width, *args, depth=depth, **options)
        self.norm = LayerNorm(width)

    def __call__(
        self,
        x: Array,
        layout: PrefixLayout,
        execution: Execution,
        states: Array | None = None,
        cross_layout: PrefixLayout | None = None,
    ) -> Array:
        """float32[U, R, D]: final states of every row."""
        definition, stacked = nnx.split(self.layers)

        def layer(x: Array, own: Any) -> tuple[Array, None]:
            return nnx.merge(definition, own)(x, layout, execution, states, cross_layout)[0], None

        x, _ = execution.over_depth(layer, x, stacked)
        return self.norm(x)

    def memory(self, x: Array, layout: PrefixLayout, execution: Execution) -> tuple[Array, Array]:
        """The self-attention's keys and values of every row and layer, each [L, U, R, N, H]."""
        definition, stacked = nnx.split(self.layers)
        _, memory = execution.over_depth(lambda x, own: nnx.merge(definition, own)(x, layout, execution), x, stacked)
        return memory
