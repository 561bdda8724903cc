"""Where kernels in Triton run: on NVIDIA GPUs of compute capability 8.0 and up, or interpreted on the CPU for tests.

Nothing here imports Triton, which takes half a second; the kernels' files do, when the first call runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """What this machine lacks, or None."""
    if not _installed():
        return "triton is not installed (pip install 'simvlm[triton]')"
    if not interpreted() and not _has_gpu():
        return "no NVIDIA GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def unsupported(name: str, x: Tensor) -> str | None:
    """Why kernels cannot take the argument `name`, by its dtype and device, or None."""
    if x.dtype not in _DTYPES:
        return f"{name} must be float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    if interpreted():
        if x.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16 with TRITON_INTERPRET=1"
    elif x.device.type != "cuda":
        return f"tensors must be on an NVIDIA GPU, got {x.device} (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    elif torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU must be an NVIDIA one of compute capability 8.0 or higher"
    return None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None
