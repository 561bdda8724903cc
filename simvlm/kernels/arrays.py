"""What the public ops ask of an array, whichever library it comes from; imports none of them."""

from __future__ import annotations

from typing import Any


def dtype_name(x: Any) -> str:
    """ "float32" for torch.float32 and numpy's or jax's float32 alike."""
    return str(x.dtype).removeprefix("torch.")


def last_axis_contiguous(family: str, x: Any) -> bool:
    if family == "torch":
        return x.stride(-1) == 1 or x.shape[-1] <= 1
    return family == "jax" or x.strides[-1] == x.itemsize or x.shape[-1] <= 1


def strides(x: Any) -> tuple[int, ...]:
    return tuple(x.strides) if isinstance(getattr(x, "strides", None), tuple) else tuple(x.stride())


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """torch tensors in the autocast dtype where autocast is on for the first one's device; None and float64 left alone."""
    import torch

    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)
