"""What every op's cpp_cpu.py needs: the compiled module, which arrays it takes, their addresses and strides."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from simvlm.kernels.arrays import dtype_name

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(the compiled module, None) or (None, why there is none)."""
    try:
        from simvlm import _cpp
    except ImportError as error:
        build_error = Path(__file__).parents[1] / "_cpp_build_error.txt"
        why = build_error.read_text().strip() if build_error.exists() else str(error)
        return None, f"the C++ kernels are not built ({why}); reinstall with a C++ compiler"
    try:
        _cpp.select_level(os.environ.get("SIMVLM_CPU_LEVEL") or None)
    except ValueError as error:
        return None, str(error)
    return _cpp, None


def unavailable() -> str | None:
    """Why this machine has no compiled module, or None."""
    return _load()[1]


def compiled() -> ModuleType:
    module, why = _load()
    assert module is not None, why
    return module


def unsupported(x: Any) -> str | None:
    """Why the kernels cannot take a call with this torch or numpy array, or None."""
    device = "cpu" if isinstance(x, np.ndarray) else x.device.type
    if device != "cpu":
        return f"runs on the CPU, got tensors on {device}"
    return unsupported_dtype(x)


def unsupported_dtype(x: Any) -> str | None:
    """Of any library's array."""
    return None if dtype_code(x) is not None else f"takes {', '.join(_DTYPES)}, got {dtype_name(x)}"


def dtype_code(x: Any) -> int | None:
    """csrc/dtype.h's number of an array's dtype; None for one that the kernels do not take."""
    code = _codes.get(x.dtype)
    if code is None:
        code = _codes[x.dtype] = _DTYPES.get(dtype_name(x), -1)
    return None if code < 0 else code


_codes: dict[Any, int] = {}
"""by dtype, of whichever library"""


def numpy_threads() -> int:
    """How many threads numpy and jax callers get; torch callers have torch.get_num_threads()."""
    return int(os.environ.get("SIMVLM_NUM_THREADS") or len(os.sched_getaffinity(0)))


def address(x: Any) -> int:
    """Of a torch or numpy array's first element; 0 for None."""
    if x is None:
        return 0
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data_ptr()


def element_strides(x: Any) -> tuple[int, ...]:
    """A torch or numpy array's strides, counted in elements."""
    return tuple(stride // x.itemsize for stride in x.strides) if isinstance(x, np.ndarray) else tuple(x.stride())


def in_elements(x: np.ndarray) -> np.ndarray:
    """x, or a copy of it where its strides are no multiples of its elements' size."""
    return x if all(stride % x.itemsize == 0 for stride in x.strides) else np.ascontiguousarray(x)
