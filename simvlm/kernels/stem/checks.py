"""The contract's checks for the stem's two ops: once, before any implementation is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from simvlm.kernels.arrays import dtype_name, last_axis_contiguous, strides
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.dispatch import did_you_mean, family_of

ACTS = ("relu", "none")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def family(op: str, needed: dict[str, Any], optional: dict[str, Any]) -> str:
    """The one library that all arrays come from; optional ones may be None."""
    try:
        return family_of(**needed, **{name: x for name, x in optional.items() if x is not None})
    except TypeError as error:
        raise TypeError(f"{op}: {error}") from None


def batch_norm_act(
    family: str,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    residual: Any,
    branch_scale: Any,
    eps: Any,
    act: Any,
) -> float:
    """Raises unless the call is the contract's; returns eps."""
    op = "batch_norm_act"
    _check_main(op, family, "x", x, 4, "[B, Hh, Ww, C]")
    if x.shape[3] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got shape {tuple(x.shape)}")
    channels = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    for name, parameter in channels.items():
        if parameter is not None:
            _check_parameter(op, family, name, parameter, "[C]", (x.shape[3],), "x", x)
    if (mean is None) != (var is None):
        missing, given = ("mean", "var") if mean is None else ("var", "mean")
        raise ValueError(
            f"{op}: {missing} must be given with {given}, got None: give both, or neither for the batch's own"
        )
    if residual is not None:
        _check_like(op, family, "residual", residual, "x", x)
        if tuple(residual.shape) != tuple(x.shape):
            raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if branch_scale is not None:
        _check_parameter(op, family, "branch_scale", branch_scale, "[B]", (x.shape[0],), "x", x)
    if act not in ACTS:
        raise ValueError(f"{op}: act must be one of {list(ACTS)}, got {act!r}{did_you_mean(act, ACTS)}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a Python float, got {type(eps).__name__}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{op}: eps must be finite and above 0, got {eps}")
    return float(eps)


def embed_sequence(
    family: str, features: Any, weight: Any, bias: Any, image_positions: Any, text: Any, layout: PrefixLayout
) -> None:
    """Raises unless the call is the contract's, lengths aside."""
    op = "embed_sequence"
    layout.check_bounds(op)
    _check_main(op, family, "text", text, 2, "[Rt, D]")
    width = text.shape[1]
    if family == "torch":
        # A layout in numpy is on the host: fine for CPU tensors, a copy in every call for others.
        where = "cpu" if isinstance(layout.bounds, np.ndarray) else layout.bounds.device.type
        if where != text.device.type:
            raise ValueError(
                f"{op}: layout must be on text's device {text.device}, got {where}: "
                "call layout.to(text.device) once a batch"
            )
    if layout.image_grid is None:
        named = {"features": features, "weight": weight, "bias": bias, "image_positions": image_positions}
        for name, x in named.items():
            if x is not None:
                raise ValueError(
                    f"{op}: {name} must be None with a layout that has no image_grid, got shape {tuple(x.shape)}"
                )
        return
    for name, x in (("features", features), ("image_positions", image_positions)):
        if x is None:
            raise ValueError(f"{op}: {name} must be given with a layout that has an image_grid, got None")
    _check_main(op, family, "features", features, 4, "[Bi, Gh, Gw, C]")
    _check_like(op, family, "features", features, "text", text)
    height, width_in_patches = layout.image_grid
    if tuple(features.shape[1:3]) != (height, width_in_patches):
        raise ValueError(
            f"{op}: features must have the layout's grid {layout.image_grid} as axes 1 and 2, "
            f"got {tuple(features.shape[1:3])}"
        )
    channels = features.shape[3]
    if weight is not None:
        _check_parameter(op, family, "weight", weight, "[D, C]", (width, channels), "features", features)
    elif channels != width:
        raise ValueError(
            f"{op}: weight must be given where C and D differ, got None with C = {channels} and D = {width}"
        )
    if bias is not None:
        _check_parameter(op, family, "bias", bias, "[D]", (width,), "features", features)
    shape = (height * width_in_patches, width)
    _check_parameter(op, family, "image_positions", image_positions, "[Gh·Gw, D]", shape, "features", features)


def lengths(placed: np.ndarray, image_shape: Sequence[int] | None, text_rows: int) -> None:
    """Raises where host `places` and the arrays disagree: how many images, how many text rows, room for the patches."""
    op = "embed_sequence"
    _, q_lens, image_lens, _, _ = placed
    short = np.flatnonzero(q_lens < image_lens)
    if short.size:
        b = int(short[0])
        raise ValueError(
            f"{op}: layout must give every sequence with an image q_lens of at least its {image_lens[b]} patches, "
            f"got q_lens[{b}] = {q_lens[b]}"
        )
    images = int((image_lens > 0).sum())
    if image_shape is not None and image_shape[0] != images:
        raise ValueError(f"{op}: features must hold the layout's {images} images (axis 0), got {image_shape[0]}")
    wanted = int((q_lens - image_lens).sum())
    if text_rows < wanted:
        raise ValueError(f"{op}: text must have at least the layout's {wanted} text rows, got {text_rows}")


def _check_main(op: str, family: str, name: str, x: Any, rank: int, axes: str) -> None:
    if len(x.shape) != rank:
        raise ValueError(f"{op}: {name} must have {rank} axes {axes}, got shape {tuple(x.shape)}")
    dtype = dtype_name(x)
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be {', '.join(_DTYPES[:-1])} (or float64, reference only), got {dtype}")
    _check_last_axis(op, family, name, x)


def _check_like(op: str, family: str, name: str, x: Any, main_name: str, main: Any) -> None:
    if x.dtype != main.dtype:
        raise TypeError(f"{op}: {name} must have {main_name}'s dtype {dtype_name(main)}, got {dtype_name(x)}")
    _check_device(op, family, name, x, main_name, main)
    _check_last_axis(op, family, name, x)


def _check_parameter(
    op: str, family: str, name: str, x: Any, axes: str, shape: tuple[int, ...], main_name: str, main: Any
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {axes} = {shape}, got {tuple(x.shape)}")
    if dtype_name(x) not in (dtype_name(main), "float32"):
        wanted = " or ".join(dict.fromkeys((dtype_name(main), "float32")))
        raise TypeError(f"{op}: {name} must be {wanted} where {main_name} is {dtype_name(main)}, got {dtype_name(x)}")
    _check_device(op, family, name, x, main_name, main)


def _check_device(op: str, family: str, name: str, x: Any, main_name: str, main: Any) -> None:
    if family == "torch" and x.device != main.device:
        raise ValueError(f"{op}: {name} must be on {main_name}'s device {main.device}, got {x.device}")


def _check_last_axis(op: str, family: str, name: str, x: Any) -> None:
    if not last_axis_contiguous(family, x):
        raise ValueError(
            f"{op}: {name} must be contiguous in its last axis, got strides {strides(x)}: call .contiguous()"
        )
