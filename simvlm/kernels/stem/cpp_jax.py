"""The stem's ops for jax arrays on the CPU through the compiled module, forward and backward, as XLA custom calls.

The kernels are in csrc/batch_norm.cc and csrc/embed.cc, their handlers in csrc/xla_door.cc; docs/stem.md derives what
is saved and why. The projection's products are XLA's, in float32 whatever the features are, for they must not be
rounded before bias and position are added. Differentiable once, in reverse; a gradient that nobody asks for is not
computed. Limits: float32, bfloat16, float16; the host only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simvlm.kernels import cpp_xla
from simvlm.kernels.cpp_xla import NOTHING, Array
from simvlm.kernels.jax_gradients import differentiable_once, is_zero
from simvlm.kernels.manual_axes import varying_alike
from simvlm.kernels.stem.places import rows_shape


def unavailable() -> str | None:
    return cpp_xla.unavailable()


def batch_norm_unsupported(x: Array) -> str | None:
    return cpp_xla.unsupported(x)


def embed_unsupported(text: Array, weight: Array | None) -> str | None:
    return cpp_xla.unsupported(text)


def _wide(x: Array | None) -> Array | None:
    """As the kernels want vectors and tables: float32. Where this is a cast, it rounds the gradient once."""
    return None if x is None else x.astype(jnp.float32)


def _constant(x: Array | None) -> Array | None:
    return None if x is None else lax.stop_gradient(x)


# ---- batch_norm_act -------------------------------------------------------------------------------------------------


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
) -> tuple[Array, Array, Array]:
    """(y, mean, var); gradients flow from y to x, weight, bias and residual."""
    frozen = mean is not None and var is not None
    if mean is None or var is None:
        vector = (x.shape[3:], jnp.float32)
        mean, var = cpp_xla.call("batch_norm_statistics", (vector, vector), lax.stop_gradient(x))
    constants = (_wide(_constant(v)) for v in (mean, var, branch_scale))
    norm = _Norm(eps, act == "relu", frozen)
    return _norm(norm, *varying_alike(x, _wide(weight), _wide(bias), residual, *constants)), mean, var


@dataclasses.dataclass(frozen=True)
class _Norm:
    """What is static in one call. frozen: mean and var are constants, not functions of x."""

    eps: float
    relu: bool
    frozen: bool


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _NormWanted:
    """Of which inputs a gradient is asked for; static, so that it travels beside the residuals."""

    x: bool
    weight: bool
    bias: bool
    residual: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(
    norm: _Norm,
    x: Array,
    weight: Array,
    bias: Array,
    residual: Array | None,
    mean: Array,
    var: Array,
    branch_scale: Array | None,
) -> Array:
    operands = (x, residual, mean, var, weight, bias, branch_scale)
    (y,) = cpp_xla.call("batch_norm_apply", ((x.shape, x.dtype),), *operands, eps=norm.eps, relu=norm.relu)
    return y


def _norm_fwd(norm: _Norm, *arguments: Any) -> tuple[Array, Any]:
    wanted = _NormWanted(*(x is not None and x.perturbed for x in arguments[:4]))
    x, weight, bias, residual, *constants = (None if x is None else x.value for x in arguments)
    y = _norm(norm, x, weight, bias, residual, *constants)
    masks = residual is not None and norm.relu
    return y, (wanted, x, y if masks else None, weight, bias, *constants)


def _norm_bwd(norm: _Norm, saved: Any, dy: Any) -> tuple[Any, ...]:
    wanted, *arrays = saved
    if is_zero(dy):
        return (None,) * 7
    return *_norm_backward_once((norm, wanted), dy, *arrays), None, None, None


def _norm_backward(
    static: tuple[_Norm, _NormWanted],
    dy: Array,
    x: Array,
    y: Array | None,
    weight: Array,
    bias: Array,
    mean: Array,
    var: Array,
    branch_scale: Array | None,
) -> tuple[Array | None, ...]:
    """(dx, dweight, dbias, dresidual), None where not wanted: the two halves of docs/stem.md."""
    norm, wanted = static
    vectors = (mean, var, weight, bias, branch_scale)
    image, vector = (x.shape, x.dtype), (x.shape[3:], jnp.float32)
    dx, dresidual, relu = None, dy, norm.relu
    sum_dz = sum_dz_norm = None
    if y is not None or wanted.weight or wanted.bias or (wanted.x and not norm.frozen):
        results = (vector, vector, NOTHING if y is None else image)
        operands = (dy, x, y, *vectors)
        sum_dz, sum_dz_norm, masked = cpp_xla.call(
            "batch_norm_backward_reductions", results, *operands, eps=norm.eps, relu=relu
        )
        if y is not None:
            dresidual, relu = masked, False
    if wanted.x:
        pixels = max(math.prod(x.shape[:3]), 1)
        means = (None, None) if norm.frozen else (sum_dz / pixels, sum_dz_norm / pixels)
        operands = (dresidual, x, *vectors, *means)
        (dx,) = cpp_xla.call("batch_norm_backward_apply", (image,), *operands, eps=norm.eps, relu=relu)
    return (
        dx,
        sum_dz_norm if wanted.weight else None,
        sum_dz if wanted.bias else None,
        dresidual if wanted.residual else None,
    )


_norm_backward_once = differentiable_once("batch_norm_act", "cpp", _norm_backward)
_norm.defvjp(_norm_fwd, _norm_bwd, symbolic_zeros=True)


# ---- embed_sequence -------------------------------------------------------------------------------------------------


def embed_sequence(
    features: Array | None,
    weight: Array | None,
    bias: Array | None,
    image_positions: Array | None,
    text: Array,
    places: Array,
    query_len: int | None,
) -> Array:
    """rows; gradients flow to every float input."""
    places = jnp.asarray(places, jnp.int32)
    if weight is None or features is None:
        return _place(query_len, *varying_alike(features, _wide(bias), _wide(image_positions), text, places))
    # What follows the sequences' own images is nobody's and may be NaN, which a zero gradient does not stop.
    owned = jnp.arange(features.shape[0]) < (places[2] > 0).sum()
    features = jnp.where(owned[:, None, None, None], features, jnp.zeros((), features.dtype))
    operand = _rounded(_wide(weight), features.dtype)
    patches = jnp.einsum("bhwc,dc->bhwd", _wide(features), operand, precision=lax.Precision.HIGHEST)
    return _place(query_len, *varying_alike(patches, _wide(bias), _wide(image_positions), text, places))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(weight: Array, dtype: Any) -> Array:
    """float32, with no more digits than `dtype` has: XLA may leave out a cast down and up again."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(weight, info.nexp, info.nmant)


@_rounded.defjvp
def _rounded_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _rounded(*primals, dtype), tangents[0]  # the gradient is not rounded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _place(
    query_len: int | None,
    patches: Array | None,
    bias: Array | None,
    positions: Array | None,
    text: Array,
    places: Array,
) -> Array:
    """rows from patches [Bi, Gh, Gw, D]: float32 (projected ones) or text's dtype (features as they are)."""
    text_rows, width = text.shape
    grid = (0, 0, 0) if patches is None else patches.shape[:3]
    shape = rows_shape(grid, text_rows, width, places.shape[1], query_len)
    if patches is None:
        patches = jnp.zeros((*grid, width), text.dtype)
    (rows,) = cpp_xla.call("embed_forward", ((shape, text.dtype),), patches, bias, positions, text, places)
    return rows


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Placed:
    """What the backward pass must know of arrays that it does not read."""

    grid: tuple[int, ...]
    dtype: Any
    text_rows: int
    patches_wanted: bool
    bias_wanted: bool
    positions_wanted: bool
    text_wanted: bool


def _place_fwd(
    query_len: int | None, patches: Any, bias: Any, positions: Any, text: Any, places: Any
) -> tuple[Array, Any]:
    inputs = (patches, bias, positions, text, places)
    wanted = (x is not None and x.perturbed for x in inputs[:4])
    patches, bias, positions, text, places = (None if x is None else x.value for x in inputs)
    grid, dtype = ((0, 0, 0), text.dtype) if patches is None else (patches.shape[:3], patches.dtype)
    rows = _place(query_len, patches, bias, positions, text, places)
    return rows, (_Placed(grid, dtype, text.shape[0], *wanted), places)


def _place_bwd(query_len: int | None, saved: Any, drows: Any) -> tuple[Any, ...]:
    placed, places = saved
    if is_zero(drows):
        return (None,) * 5
    return *_place_backward_once(placed, drows, places), None


def _place_backward(placed: _Placed, drows: Array, places: Array) -> tuple[Array | None, ...]:
    """(dpatches, dbias, dpositions, dtext), None where not wanted."""
    width, (images, height, grid_width) = drows.shape[-1], placed.grid
    asked = (
        placed.patches_wanted,
        placed.bias_wanted,
        placed.positions_wanted or placed.bias_wanted,  # of which dbias is the sum
        placed.text_wanted,
    )
    shapes = (
        ((*placed.grid, width), placed.dtype),
        ((width,), jnp.float32),
        ((height * grid_width, width), jnp.float32),
        ((placed.text_rows, width), drows.dtype),
    )
    results = [shape if want else NOTHING for shape, want in zip(shapes, asked, strict=True)]
    sizes = {"images": images, "grid_height": height, "grid_width": grid_width, "text_rows": placed.text_rows}
    dpatches, dbias, dpositions, dtext = cpp_xla.call("embed_backward", results, drows, places, **sizes)
    return (
        dpatches if placed.patches_wanted else None,
        dbias if placed.bias_wanted else None,
        dpositions if placed.positions_wanted else None,
        dtext if placed.text_wanted else None,
    )


_place_backward_once = differentiable_once("embed_sequence", "cpp", _place_backward)
_place.defvjp(_place_fwd, _place_bwd, symbolic_zeros=True)
