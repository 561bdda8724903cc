"""`embed_sequence` in plain JAX, for whatever XLA compiles to: CPU, GPU, TPU.

    rows[q_starts[b] + i] = weight · patch i of b's image + bias + image_positions[i]   where i < image_lens[b]
                            the next row of b's text                                    elsewhere; 0 where none is

One product over all patches, whose epilogue adds bias and position in float32 and rounds once; then every storage row
is gathered, from the patches or from the text. The backward pass gathers the other way round: each patch, and each row
of text, knows the one storage row that it went to. So there is no scatter, no concatenation of patches and text, and
nothing that nobody asks for meets arithmetic. Where a row stands is found from `places` by comparing it with every
sequence: R·B comparisons of integers in one fusion, which keep no array of that size.

Differentiable once, in reverse; jvp and jacfwd raise JAX's own error about functions with a custom vjp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simvlm.kernels.manual_axes import varying_alike
from simvlm.kernels.stem.places import rows_shape

Array = Any  # jax arrays and tracers


def unavailable() -> str | None:
    return None


def unsupported(text: Array, weight: Array | None) -> str | None:
    if text.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"text must be float32, bfloat16 or float16, got {text.dtype}"
    return None


def embed_sequence(
    features: Array | None,
    weight: Array | None,
    bias: Array | None,
    image_positions: Array | None,
    text: Array,
    places: Array,
    query_len: int | None,
) -> Array:
    """rows as `embed_sequence` documents them, `places` as in places.py; differentiable once, in reverse."""
    call = _Call(None if features is None else features.shape, text.shape[0], query_len)
    places = jnp.asarray(places, jnp.int32)
    return _embed(call, *varying_alike(features, weight, bias, image_positions, text, places))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in one call; `query_len` is T of a padded layout."""

    image_shape: tuple[int, ...] | None
    text_rows: int
    query_len: int | None

    @property
    def grid(self) -> int:
        """Patches of one image."""
        return 0 if self.image_shape is None else self.image_shape[1] * self.image_shape[2]

    @property
    def patches(self) -> int:
        return 0 if self.image_shape is None else self.image_shape[0] * self.grid

    def rows_shape(self, width: int, places: Array) -> tuple[int, ...]:
        return rows_shape(self.image_shape, self.text_rows, width, places.shape[1], self.query_len)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(
    call: _Call,
    features: Array | None,
    weight: Array | None,
    bias: Array | None,
    image_positions: Array | None,
    text: Array,
    places: Array,
) -> Array:
    width = text.shape[1]
    shape = call.rows_shape(width, places)
    patch, text_row = _source_of_each_row(call, places, math.prod(shape[:-1]))
    rows = _rows_of(text, text_row)
    if features is not None and call.patches:
        images = features.reshape(-1, call.grid, features.shape[3])
        if weight is not None:
            images = _product("jic,dc->jid", images, weight.astype(features.dtype))
        for parameter in (bias, image_positions):
            if parameter is not None:
                images = images.astype(jnp.float32) + parameter.astype(jnp.float32)
        images = images.astype(text.dtype).reshape(call.patches, width)
        rows = jnp.where((patch >= 0)[:, None], _rows_of(images, patch), rows)
    return rows.reshape(shape)


def _embed_fwd(
    call: _Call, features: Any, weight: Any, bias: Any, image_positions: Any, text: Any, places: Any
) -> tuple[Array, Any]:
    rows = _embed(call, features, weight, bias, image_positions, text, places)
    # Of bias and positions the dtypes are needed alone, which empty arrays carry.
    bias, image_positions = (None if x is None else x[:0] for x in (bias, image_positions))
    return rows, (None if weight is None else features, weight, bias, image_positions, places)


def _embed_bwd(call: _Call, saved: Any, drows: Array) -> tuple[Any, ...]:
    return *_backward_once(call, drows, *saved), None


_embed.defvjp(_embed_fwd, _embed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward_once(
    call: _Call,
    drows: Array,
    features: Array | None,
    weight: Array | None,
    bias: Array | None,
    image_positions: Array | None,
    places: Array,
) -> tuple[Array | None, ...]:
    """(dfeatures, dweight, dbias, dimage_positions, dtext); `features` is None where weight is."""
    width, dtype = drows.shape[-1], drows.dtype
    drows = drows.reshape(-1, width)
    patch_row, text_row = _row_of_each_source(call, places, drows.shape[0])
    dtext = _rows_of(drows, text_row)
    if call.image_shape is None:
        return None, None, None, None, dtext
    dimages = _rows_of(drows, patch_row).reshape(call.image_shape[0], call.grid, width)
    dfeatures, dweight = dimages, None
    if features is not None and weight is not None:
        dfeatures = _product("jid,dc->jic", dimages, weight.astype(dtype)).astype(dtype)
        # Patches of nobody may be NaN, which a zero gradient does not stop.
        images = features.reshape(*dimages.shape[:2], features.shape[3])
        images = jnp.where((patch_row >= 0).reshape(*dimages.shape[:2], 1), images, jnp.zeros((), dtype))
        dweight = _product("jid,jic->dc", dimages, images).astype(weight.dtype)
    dpositions = dimages.astype(jnp.float32).sum(0)
    dbias = None if bias is None else dpositions.sum(0).astype(bias.dtype)
    dpositions = None if image_positions is None else dpositions.astype(image_positions.dtype)
    return dfeatures.reshape(call.image_shape), dweight, dbias, dpositions, dtext


def _no_second_gradient(*_: Any) -> Any:
    raise NotImplementedError("embed_sequence: double backward is not supported by impl='xla'")


_backward_once.defvjp(_no_second_gradient, _no_second_gradient)


def _source_of_each_row(call: _Call, places: Array, rows: int) -> tuple[Array, Array]:
    """(patch, text row) of each storage row, int32[rows]; -1 where it is not that, or what it asks for is not there."""
    row = jnp.arange(rows)
    owner = _first_above(places[0], row) - 1 if call.query_len is None else row // max(call.query_len, 1)
    q_starts, q_lens, image_lens, image_index, text_starts = _at(places, owner)
    i = row - q_starts
    owned, in_image = (owner >= 0) & (i < q_lens), i < image_lens
    patch, text_row = image_index * call.grid + i, text_starts + i - image_lens
    return (
        jnp.where(owned & in_image & (patch < call.patches), patch, -1),
        jnp.where(owned & ~in_image & (text_row < call.text_rows), text_row, -1),
    )


def _row_of_each_source(call: _Call, places: Array, rows: int) -> tuple[Array, Array]:
    """(of each patch, of each text row) the storage row, int32; -1 where it went to none."""
    q_starts, q_lens, image_lens, image_index, text_starts = places
    room = rows if call.query_len is None else call.query_len

    def row_of(owner: Array, position_in: Any) -> Array:
        q_start, q_len, *rest = _at(places, owner)
        i = position_in(*rest)
        there = (owner < q_starts.shape[0]) & (i < jnp.minimum(q_len, room)) & (q_start + i < rows)
        return jnp.where(there, q_start + i, -1)

    patch, text_row = jnp.arange(call.patches), jnp.arange(call.text_rows)
    # The first sequence by whose end there are more images (more text) than this one's index.
    image = patch // max(call.grid, 1)
    of_patch = row_of(
        _first_above(image_index + image_lens.clip(0, 1), image),
        lambda image_len, *_: jnp.where(patch % max(call.grid, 1) < image_len, patch % max(call.grid, 1), room),
    )
    of_text = row_of(
        _first_above(text_starts + (q_lens - image_lens).clip(0), text_row),
        lambda image_len, _, text_start: text_row - text_start + image_len,
    )
    return of_patch, of_text


def _first_above(ascending: Array, values: Array) -> Array:
    """int32, of each value: how many of `ascending` are not above it, which is the first that is."""
    return (ascending <= values[:, None]).sum(1, dtype=jnp.int32)


def _at(places: Array, owner: Array) -> Array:
    """int32[5, n]: the columns `owner` of places; zeros where there is no such sequence."""
    if places.shape[1] == 0:
        return jnp.zeros((places.shape[0], owner.shape[0]), places.dtype)
    return jnp.take(places, owner, axis=1, mode="fill", fill_value=0)


def _rows_of(x: Array, index: Array) -> Array:
    """[n, D]: rows of x, zeros where index is -1."""
    if x.shape[0] == 0:
        return jnp.zeros((index.shape[0], x.shape[1]), x.dtype)
    return jnp.where((index >= 0)[:, None], jnp.take(x, index, axis=0, mode="clip"), jnp.zeros((), x.dtype))


def _product(equation: str, a: Array, b: Array) -> Array:
    """float32, from factors of one dtype."""
    # A TPU's default for float32 is one bfloat16 product.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
