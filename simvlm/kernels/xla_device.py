"""What the torch-xla implementations share: which tensors they take, and storage rows moved by gathers alone.

They are plain torch operations of static shapes, so nothing here or in their files needs torch_xla to be imported. A
lazy tensor is worth no look at its values: every index is computed on the device, from the layout's integers.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """What this machine lacks, or None."""
    return None if _installed() else "torch_xla is not installed (pip install 'simvlm[torch-xla]')"


def unsupported(name: str, x: Tensor) -> str | None:
    """Why the argument `name` cannot be taken, by its dtype and device, or None."""
    if x.dtype not in _DTYPES:
        return f"{name} must be float32, bfloat16 or float16, got {_name(x)}"
    return None if x.device.type == "xla" else f"runs on XLA devices, got tensors on {x.device.type}"


def imprecise(name: str, x: Tensor) -> str | None:
    """Why matrix products of the argument `name` would miss the error budget on its device, or None.

    A TPU rounds float32 operands to bfloat16 unless told not to, which is exact for bfloat16 inputs alone.
    """
    if x.device.type == "xla" and x.dtype != torch.bfloat16 and _rounds_products():
        return (
            f"a TPU would round the products of {name} to bfloat16, got {_name(x)}: call "
            "torch_xla.backends.set_mat_mul_precision('highest') first"
        )
    return None


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


def _rounds_products() -> bool:
    from torch_xla import backends, runtime

    return runtime.device_type() == "TPU" and backends.get_mat_mul_precision() != "highest"


def unstacked(x: Tensor) -> list[Tensor]:
    """The rows of x, as by unbind(0).

    Inside a registered op torch_xla 2.9 is below functionalization, and there select and unbind may pick along another
    axis (index 0 of a square array: its first column). Slices and squeezes are right.
    """
    return [row.squeeze(0) for row in x.split(1)]


def owners(starts: Tensor, lens: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each storage row 0 … rows-1: its sequence, its place there, and whether a sequence owns it at all.

    Counts the sequences that end before a row: the comparison is fused into its sum, and torch_xla has no searchsorted.

    Args:
        starts, lens: int32[B] with B > 0, ranges that ascend without overlap.

    Returns:
        int64[rows] (any sequence where nobody owns the row), int32[rows], bool[rows].
    """
    row = torch.arange(rows, dtype=starts.dtype, device=starts.device)
    owner = (starts + lens <= row[:, None]).sum(1).clamp(max=starts.shape[0] - 1)
    place = row - starts.index_select(0, owner)
    return owner, place, (place >= 0) & (place < lens.index_select(0, owner))


def take(x: Tensor, rows: Tensor, real: Tensor, fill: float = 0.0) -> Tensor:
    """x[rows] of shape [*rows.shape, …]; `fill` where not `real`, whatever row of x is named there."""
    if x.shape[0] == 0:
        return x.new_full((*rows.shape, *x.shape[1:]), fill)
    picked = x.index_select(0, rows.clamp(0, x.shape[0] - 1).flatten()).reshape(*rows.shape, *x.shape[1:])
    return torch.where(real.reshape(*rows.shape, *(1,) * (x.ndim - 1)), picked, fill)
