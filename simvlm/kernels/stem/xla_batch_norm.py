"""`batch_norm_act` in plain JAX, for whatever XLA compiles to: CPU, GPU, TPU.

    y  = act(s_b · ((x - mean) · weight · rstd + bias) + residual),  rstd = 1 / sqrt(var + eps)
    dx = weight · rstd · (dz - Σ dz / M - norm · Σ dz·norm / M),     dz = s_b · dy · [act let it through]

The four halves of docs/stem.md, each of them one fusion over the images: x is read twice forward. The statistics are
taken in one read: an image's sums are of its differences from the mean of its middle row (column, where Hh > Ww), and
the images' means and squares, [B, C] of each, are merged about the mean of all. Squares about another point than the
mean lose 1 + (its distance / deviation)² in rounding: that is near 1, and at the most 1 + min(Hh, Ww), for no row lies
further from its image's mean.

Saved for backward: x, the [C] vectors, and y only where a residual went into a relu; elsewhere z > 0 is computed again.

Replicas: where jit partitions a batch that is sharded over a mesh, statistics and sums are the whole batch's by
themselves. Inside `shard_map` and `vmap` they are where `axis_name` says over which axes: reductions of [C] vectors
between the halves, of which the backward ones are JAX's own transposes of the forward ones (a collective inside a
gradient rule would find no axis where the gradient is taken outside `vmap`). Therefore each forward half has a rule of
its own. Differentiable once, in reverse; jvp and jacfwd raise JAX's own error about functions with a custom vjp.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simvlm.kernels.manual_axes import varying_alike

Array = Any  # jax arrays and tracers

_PIXELS = (0, 1, 2)


def unavailable() -> str | None:
    return None


def unsupported(x: Array) -> str | None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    return None


def batch_norm_act(
    x: Array,
    weight: Array,
    bias: Array,
    mean: Array | None,
    var: Array | None,
    residual: Array | None,
    branch_scale: Array | None,
    eps: float,
    act: str,
    axis_name: Any = None,
) -> tuple[Array, Array, Array]:
    """(y, mean, var) as `batch_norm_act` documents them; differentiable once, in reverse.

    Args:
        axis_name: name, or tuple of names, of the mapped axes (`shard_map`, `vmap`) whose replicas' pixels are one
            batch; None for none. mean and var are then the whole batch's; the gradients of weight and bias are this
            replica's share, to be summed with the other parameters' (`shard_map` does, with check_vma).
    """
    call = _Call(eps=eps, act=act, frozen=mean is not None)
    wide = _wide(x)
    if mean is None or var is None:
        mean, var = _statistics(wide, x)
        if axis_name is not None:
            mean, var = _of_all_replicas(mean, var, axis_name)
    y = _apply(call, *varying_alike(wide, x, mean, var, weight, bias, residual, branch_scale))
    return y, *((mean, var) if call.frozen else map(lax.stop_gradient, (mean, var)))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call; `frozen`: mean and var are constants."""

    eps: float
    act: str
    frozen: bool


# `wide` is x in float32: where the gradients of both functions below meet, to be rounded once. None of its values is
# read, so XLA drops the array itself.


@jax.custom_vjp
def _statistics(wide: Array, x: Array) -> tuple[Array, Array]:
    """(mean, var), biased, float32[C]; both 0 where there is no pixel."""
    images, height, width, channels = x.shape
    pixels = height * width
    if images * pixels == 0:
        return jnp.zeros(channels, jnp.float32), jnp.zeros(channels, jnp.float32)
    middle = x[:, height // 2] if height <= width else x[:, :, width // 2]
    shift = _wide(middle).mean(1)
    difference = _wide(x) - shift[:, None, None]
    total, squares = difference.sum((1, 2)), jnp.square(difference).sum((1, 2))
    means, squares = shift + total / pixels, jnp.maximum(squares - total * total / pixels, 0.0)
    mean = means.mean(0)
    return mean, (squares / pixels + jnp.square(means - mean)).mean(0)


def _statistics_fwd(wide: Array, x: Array) -> tuple[tuple[Array, Array], Any]:
    mean, var = _statistics(wide, x)
    return (mean, var), (x, mean)


def _statistics_bwd(saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    return _statistics_backward(*saved, *cotangents), None


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


@jax.custom_vjp
def _statistics_backward(x: Array, mean: Array, dmean: Array, dvar: Array) -> Array:
    pixels = max(x.size // x.shape[3], 1)
    return dmean / pixels + (_wide(x) - mean) * (2 * dvar / pixels)


def _of_all_replicas(mean: Array, var: Array, axis_name: Any) -> tuple[Array, Array]:
    """mean and var of all replicas' pixels, from each one's; replicas run one program, so each has as many."""
    of_all = lax.pmean(mean, axis_name)
    # No gradient reaches of_all from here: the differences from it add up to 0.
    return of_all, lax.pmean(var + jnp.square(mean - lax.stop_gradient(of_all)), axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    call: _Call,
    wide: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    branch_scale: Array | None,
) -> Array:
    z = _pre_activation(call, x, mean, var, weight, bias, branch_scale)
    if residual is not None:
        z += _wide(residual)
    return (jnp.maximum(z, 0.0) if call.act == "relu" else z).astype(x.dtype)


def _apply_fwd(call: _Call, wide: Array, x: Array, *rest: Any) -> tuple[Array, Any]:
    y = _apply(call, wide, x, *rest)
    *vectors, residual, branch_scale = rest
    # The residual's own values are not needed: its presence travels as the structure of what is saved, {} or None.
    marker: Any = None if residual is None else {}
    return y, (x, y if residual is not None and call.act == "relu" else None, marker, *vectors, branch_scale)


def _apply_bwd(call: _Call, saved: Any, dy: Array) -> tuple[Any, ...]:
    x, y, marker, *vectors = saved
    dx, *of_vectors, dresidual = _apply_backward(call, dy, x, y, *vectors)
    return dx, None, *of_vectors, None if marker is None else dresidual, None


_apply.defvjp(_apply_fwd, _apply_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_backward(
    call: _Call,
    dy: Array,
    x: Array,
    y: Array | None,
    mean: Array,
    var: Array,
    weight: Array,
    bias: Array,
    branch_scale: Array | None,
) -> tuple[Array | None, ...]:
    """(dx with mean and var as constants, float32; dmean, dvar, dweight, dbias; dresidual)."""
    vectors = mean, var, weight, bias, branch_scale
    if call.act == "relu":
        live = _pre_activation(call, x, *vectors) if y is None else y
        dy = jnp.where(live > 0, dy, jnp.zeros((), dy.dtype))
    dz = _scaled(_wide(dy), branch_scale)
    rstd = lax.rsqrt(_wide(var) + call.eps)
    sum_dz, sum_dz_norm = dz.sum(_PIXELS), (dz * ((_wide(x) - _wide(mean)) * rstd)).sum(_PIXELS)
    slope = _wide(weight) * rstd
    of_statistics = (None, None) if call.frozen else (-slope * sum_dz, -0.5 * slope * rstd * sum_dz_norm)
    return slope * dz, *of_statistics, sum_dz_norm.astype(weight.dtype), sum_dz.astype(bias.dtype), dy


def _no_second_gradient(*_: Any) -> Any:
    raise NotImplementedError("batch_norm_act: double backward is not supported by impl='xla'")


_statistics_backward.defvjp(_no_second_gradient, _no_second_gradient)
_apply_backward.defvjp(_no_second_gradient, _no_second_gradient)


def _pre_activation(
    call: _Call, x: Array, mean: Array, var: Array, weight: Array, bias: Array, branch_scale: Array | None
) -> Array:
    """z, the residual apart."""
    slope = _wide(weight) * lax.rsqrt(_wide(var) + call.eps)
    return _scaled((_wide(x) - _wide(mean)) * slope + _wide(bias), branch_scale)


def _scaled(x: Array, branch_scale: Array | None) -> Array:
    return x if branch_scale is None else x * _wide(branch_scale)[:, None, None, None]


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
