"""The stem's ops on the CPU through the compiled module: torch tensors (the halves) and numpy arrays (forward).

The kernels are in csrc/batch_norm.cc and csrc/embed.cc; this file allocates, hands addresses and strides over, and
multiplies by the projection: that product is the library's (torch's or numpy's), in float32 whatever the features are,
for it must not be rounded before bias and position are added. Limits: float32, bfloat16, float16; the host only.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from simvlm.kernels import cpp_module
from simvlm.kernels.cpp_module import address
from simvlm.kernels.stem.places import rows_shape


def unavailable() -> str | None:
    return cpp_module.unavailable()


def batch_norm_unsupported(x: Any) -> str | None:
    return cpp_module.unsupported(x)


def embed_unsupported(text: Any, weight: Any) -> str | None:
    return cpp_module.unsupported(text)


def batch_norm_act(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray | None,
    var: np.ndarray | None,
    residual: np.ndarray | None,
    branch_scale: np.ndarray | None,
    eps: float,
    act: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, mean, var) for numpy arrays."""
    x, residual = cpp_module.in_elements(x), None if residual is None else cpp_module.in_elements(residual)
    if mean is None or var is None:
        mean, var = batch_norm_statistics(x)
    given = [_vector(v) for v in (mean, var, weight, bias)]
    y = batch_norm_apply(x, given[0], given[1], given[2], given[3], residual, _vector(branch_scale), eps, act)
    return y, mean, var


def batch_norm_statistics(x: Any) -> tuple[Any, Any]:
    mean, var = _vector_like(x), _vector_like(x)
    cpp_module.compiled().batch_norm_statistics(_strided(x), address(mean), address(var), *_statics(x))
    return mean, var


def batch_norm_apply(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, branch_scale: Any, eps: float, act: str
) -> Any:
    y = _images_like(x)
    vectors = _addresses(mean, var, weight, bias, branch_scale)
    cpp_module.compiled().batch_norm_apply(
        _strided(x), _strided(residual), address(y), vectors, eps, act == "relu", *_statics(x)
    )
    return y


def batch_norm_backward_reductions(
    dy: Any,
    x: Any,
    y: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    branch_scale: Any,
    eps: float,
    act: str,
) -> tuple[Any, Any, Any]:
    sums = _vector_like(x), _vector_like(x)
    dresidual = None if y is None else _images_like(x)
    vectors = _addresses(mean, var, weight, bias, branch_scale)
    cpp_module.compiled().batch_norm_backward_reductions(
        _strided(x), *_addresses(dy, y, dresidual, *sums), vectors, eps, act == "relu", *_statics(x)
    )
    return *sums, dresidual


def batch_norm_backward_apply(
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    branch_scale: Any,
    mean_dz: Any,
    mean_dz_norm: Any,
    eps: float,
    act: str,
) -> Any:
    dx = _images_like(x)
    vectors = _addresses(mean, var, weight, bias, branch_scale)
    cpp_module.compiled().batch_norm_backward_apply(
        _strided(x), *_addresses(dy, mean_dz, mean_dz_norm, dx), vectors, eps, act == "relu", *_statics(x)
    )
    return dx


def embed_sequence(
    features: Any, weight: Any, bias: Any, image_positions: Any, text: Any, places: Any, query_len: int | None
) -> Any:
    image_shape = None if features is None else tuple(features.shape)
    shape = rows_shape(image_shape, text.shape[0], text.shape[1], places.shape[1], query_len)
    patches = features if features is None or weight is None else _projected(features, weight)
    if isinstance(text, np.ndarray):
        rows, text = np.empty(shape, text.dtype), cpp_module.in_elements(text)
        patches = None if patches is None else cpp_module.in_elements(patches)
        bias, image_positions, places = (
            _vector(bias),
            _vector(image_positions),
            np.require(places, np.int32, ["C", "A"]),
        )
    else:
        rows, places = text.new_empty(shape), places.contiguous()
    cpp_module.compiled().embed_forward(
        _strided(patches),
        weight is not None,
        *_addresses(bias, image_positions, text),
        cpp_module.element_strides(text)[0],
        address(rows),
        *_embed_statics(rows, image_shape, text.shape[0], places),
    )
    return rows


def embed_sequence_backward(
    drows: Any,
    features: Any,
    weight: Any,
    places: Any,
    image_shape: tuple[int, ...] | None,
    text_rows: int,
    query_len: int | None,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Any, ...]:
    width, wide = drows.shape[-1], _torch().float32
    images, grid = (0, 0) if image_shape is None else (image_shape[0], image_shape[1] * image_shape[2])
    dpatches = dbias = dpositions = dfeatures = dweight = None
    if image_shape is not None:
        if wanted[0] or (wanted[1] and weight is not None):
            dpatches = drows.new_empty(images * grid, width, dtype=drows.dtype if weight is None else wide)
        if wanted[2] or wanted[3]:
            dbias, dpositions = drows.new_empty(width, dtype=wide), drows.new_empty(grid, width, dtype=wide)
    dtext = drows.new_empty(text_rows, width) if wanted[4] else None
    places = places.contiguous()
    cpp_module.compiled().embed_backward(
        *_addresses(drows, dpatches),
        weight is not None,
        *_addresses(dbias, dpositions, dtext),
        *_embed_statics(drows, image_shape, text_rows, places),
    )
    if dpatches is not None and weight is not None and image_shape is not None:
        if wanted[0]:
            dfeatures = _product(dpatches, weight.float()).to(drows.dtype).view(image_shape)
        if wanted[1]:
            # What follows the sequences' own images is nobody's and may be NaN, which a zero gradient does not stop.
            owned = min(images, int(places[2].count_nonzero()))
            real = features[:owned].float().reshape(owned * grid, image_shape[3])
            dweight = _product(dpatches[: owned * grid].T, real)
    elif dpatches is not None:
        dfeatures = dpatches.view(image_shape)
    return dfeatures, dweight, dbias if wanted[2] else None, dpositions if wanted[3] else None, dtext


def _projected(features: Any, weight: Any) -> Any:
    """float32[Bi, Gh, Gw, D]: features · weightᵀ, each rounded to the features' dtype before."""
    patches, (width, channels) = math.prod(features.shape[:3]), weight.shape
    if isinstance(features, np.ndarray):
        x, w = features.astype(np.float32), weight.astype(features.dtype).astype(np.float32)
    else:
        x, w = features.float(), weight.to(features.dtype).float()
    return _product(x.reshape(patches, channels), w.T).reshape(*features.shape[:3], width)


def _product(a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray):
        return a @ b
    with _torch().autocast("cpu", enabled=False):
        return a @ b


def _torch() -> Any:
    """torch, which a caller with torch tensors has imported; numpy callers need not have it."""
    return sys.modules["torch"]


def _images_like(x: Any) -> Any:
    return np.empty(x.shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(x.shape)


def _vector_like(x: Any) -> Any:
    """float32[C]."""
    channels = x.shape[-1]
    return (
        np.empty(channels, np.float32) if isinstance(x, np.ndarray) else x.new_empty(channels, dtype=_torch().float32)
    )


def _vector(x: np.ndarray | None) -> np.ndarray | None:
    """float32, contiguous and aligned."""
    return None if x is None else np.require(x, np.float32, ["C", "A"])


def _addresses(*arrays: Any) -> tuple[int, ...]:
    return tuple(address(x) for x in arrays)


def _strided(x: Any) -> tuple[int, ...]:
    """Address, then the strides of image, row and column in elements."""
    return (0, 0, 0, 0) if x is None else (address(x), *cpp_module.element_strides(x)[:3])


def _statics(x: Any) -> tuple[Any, ...]:
    threads = cpp_module.numpy_threads() if isinstance(x, np.ndarray) else _torch().get_num_threads()
    return tuple(x.shape), cpp_module.dtype_code(x), threads


def _embed_statics(rows: Any, image_shape: tuple[int, ...] | None, text_rows: int, places: Any) -> tuple[Any, ...]:
    images = (0, 0, 0) if image_shape is None else image_shape[:3]
    width = rows.shape[-1]
    storage = rows.size if isinstance(rows, np.ndarray) else rows.numel()
    threads = _statics(rows)[1:]
    return (places.shape[1], storage // max(width, 1), *images, text_rows, width), address(places), *threads
