"""The gradient glue of `prefix_attention` for jax arrays: one `custom_vjp` around any implementation's two passes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from simvlm.kernels.jax_gradients import differentiable_once, is_zero

Array = Any  # jax arrays and tracers


class Call(Protocol):
    """What is static in one call of an implementation; hashable."""

    @property
    def keys_ascend(self) -> bool: ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Of which inputs a gradient is asked for; static, so that it travels beside the residuals."""

    q: bool
    k: bool
    v: bool
    table: bool


def differentiable(impl: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """(call, q, k, v, table, bounds) → (out, lse), differentiable once, in reverse.

    Args:
        impl: whose passes these are, for the error about a second derivative.
        forward: (call, q, k, v, table, bounds) → (out, lse).
        backward: (call, wanted, dout, dlse, q, k, v, table, bounds, out, lse) → (dq, dk, dv, dtable), None where not
            wanted; dlse is None where it is zero.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(call: Call, q: Array, k: Array, v: Array, table: Array | None, bounds: Array) -> Any:
        return forward(call, q, k, v, table, bounds)

    def passed(call: Call, q: Any, k: Any, v: Any, table: Any, bounds: Any) -> Any:
        if not call.keys_ascend and (k.perturbed or v.perturbed):
            raise ValueError(
                "prefix_attention: k and v must not be differentiated where the layout's key ranges overlap or do not "
                "ascend; use jax.lax.stop_gradient, or give every sequence its own keys"
            )
        wanted = Wanted(q.perturbed, k.perturbed, v.perturbed, table is not None and table.perturbed)
        q, k, v, bounds = q.value, k.value, v.value, bounds.value
        table = None if table is None else table.value
        # Not `forward`: differentiated a second time, that would raise an error of its own before ours.
        out, lse = attention(call, q, k, v, table, bounds)
        return (out, lse), (wanted, q, k, v, table, bounds, out, lse)

    def pulled(call: Call, saved: Any, cotangents: Any) -> Any:
        wanted, *arrays = saved
        dout, dlse = (None if is_zero(x) else x for x in cotangents)
        if dout is None:
            dout = jnp.zeros(arrays[0].shape, arrays[0].dtype)
        return *once((call, wanted), dout, dlse, *arrays), None

    def of_static(static: tuple[Call, Wanted], *arrays: Any) -> Any:
        return backward(*static, *arrays)

    attention.defvjp(passed, pulled, symbolic_zeros=True)
    once = differentiable_once("prefix_attention", impl, of_static)
    return attention
