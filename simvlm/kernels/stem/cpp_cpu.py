"""The stem's ops on the CPU through the compiled module: torch tensors (the halves) and numpy arrays (forward).

The kernels are in csrc/batch_norm.cc; this file allocates, hands addresses and strides over, and nothing else. Limits:
float32, bfloat16, float16; the host only.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from simvlm.kernels import cpp_module
from simvlm.kernels.cpp_module import address


def unavailable() -> str | None:
    return cpp_module.unavailable()


def batch_norm_unsupported(x: Any) -> str | None:
    return cpp_module.unsupported(x)


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
