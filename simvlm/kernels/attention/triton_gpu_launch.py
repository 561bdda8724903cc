"""How the attention kernels in Triton are launched: tile sides, warps, stages of overlapped loads.

`python -m benchmarks.tune` finds them on a GPU and writes them to `triton_gpu_launch.json`, a row for each compute
capability, dtype, head_dim and kernel; where that has no row, the rule here holds, which comes from counting
instructions, registers and spills in the compiled code. Nothing is measured when a kernel is called.

A sequence's numbers depend on the tile sides, and must not depend on its batch: so no row asks for lengths.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import torch

KERNELS = ("forward", "dq", "dk_dv", "pairs")
OPTIONS = ("BLOCK_T", "BLOCK_S", "num_warps", "num_stages")
FILE = "triton_gpu_launch.json"

Key = tuple[int, str, int, str]
"""(compute capability as 90, dtype as "bfloat16", head_dim, kernel)"""


@functools.cache
def measured() -> dict[Key, dict[str, int]]:
    """The rows of the file."""
    rows = json.loads(importlib.resources.files(__package__).joinpath(FILE).read_text())
    return {
        (row["capability"], row["dtype"], row["head_dim"], row["kernel"]): {name: row[name] for name in OPTIONS}
        for row in rows
    }


def options(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, *, gathers: bool) -> dict[str, Any]:
    """What a launch of one of `KERNELS` takes: `OPTIONS`, and WARPS, the warps as the kernel knows them.

    Args:
        gathers: does it gather the table, instead of loading an expanded one or having none?
    """
    on = capability(device)
    found = measured().get((on, str(dtype).removeprefix("torch."), head_dim, kernel))
    found = found or rule(kernel, head_dim, dtype, on)
    if gathers and dtype != torch.float32:
        found = found | _gathering(kernel, head_dim, on)
    return found | {"WARPS": found["num_warps"]}


def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for a CPU, where the interpreter takes what Hopper does."""
    return _capability(device.index) if device.type == "cuda" else 0


def rule(kernel: str, head_dim: int, dtype: torch.dtype, on: int) -> dict[str, int]:
    """`OPTIONS` of a kernel that nobody has measured on compute capability `on`."""
    if dtype == torch.float32:  # each product is three; larger tiles of them spill
        sides = {"BLOCK_T": 16 if kernel == "pairs" else 32, "BLOCK_S": 32}
        return sides | {"num_warps": 4 if kernel == "pairs" else 8, "num_stages": 1 if head_dim > 64 else 2}
    found = {"BLOCK_T": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 2}
    narrow = not _multiplies_from_shared_memory(on)
    if kernel == "dk_dv":
        if narrow or head_dim > 80:
            found |= {"BLOCK_T": 32}
    elif narrow or head_dim > 96:
        found |= {"BLOCK_S": 32}  # pairs as dq, or the table that was expanded for dq would not be the one for pairs
    # Eight warps issue as many instructions each as four: they are for where registers run out even so.
    if head_dim > 96 and (kernel == "dk_dv" or (kernel == "forward" and narrow)):
        found |= {"num_warps": 8}
    return found


def _gathering(kernel: str, head_dim: int, on: int) -> dict[str, int]:
    """What spares the registers that addresses take. Never other sides, nor warps forward: the bits would differ."""
    narrow = not _multiplies_from_shared_memory(on)
    if kernel == "dk_dv":
        warps = {"num_warps": 8} if 64 < head_dim <= 80 else {}
        return warps | ({"num_stages": 1} if head_dim <= 16 or (narrow and head_dim > 32) else {})
    if kernel == "pairs":
        return {"num_stages": 1} if narrow else {"num_warps": 8}
    if kernel == "dq" and (head_dim > 32 if narrow else head_dim > 96 and on < 100):
        return {"num_stages": 1}
    return {}


def _multiplies_from_shared_memory(on: int) -> bool:
    """wgmma and tcgen05 do; mma.sync, of all other GPUs, takes its operands from registers."""
    return on // 10 in (0, 9, 10, 11)


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
