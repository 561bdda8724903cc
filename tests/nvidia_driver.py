"""Is there an NVIDIA GPU? Asked of its driver: torch may import triton, which must know by then."""

from __future__ import annotations

import ctypes


def has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0
