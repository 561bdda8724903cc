"""`batch_norm_act` as data, in numpy alone: cases, inputs, FLOPs, bytes, error budget. See attention/spec.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from simvlm.kernels.attention.spec import DTYPES, FLOOR, RATIO_MAX, RATIO_RMS
from simvlm.kernels.stem import batch_norm_act

__all__ = ["CASES", "DIFFERENTIABLE", "DTYPES", "FLOOR", "OUTPUTS", "RATIO_MAX", "RATIO_RMS", "Case"]

OUTPUTS = ("y", "mean", "var")
DIFFERENTIABLE = ("x", "weight", "bias", "residual")
KINK = 2.0**-16
"""times the magnitude of z: so near to 0 relu's gradient is a matter of rounding, and `dy` is 0 there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        shape: [B, Hh, Ww, C].
        frozen: mean and var are given.
        centre, spread: of x, beside which the mean of each channel varies by `spread`.
        memory: "contiguous"; "channels_last" (a view of torch's [B, C, Hh, Ww]); "strided_batch" (every other image of
            a larger array); "misaligned" (one element off a 64-byte boundary).
    """

    name: str
    shape: tuple[int, int, int, int]
    residual: bool = False
    branch_scale: tuple[float, ...] | None = None
    frozen: bool = False
    act: str = "relu"
    eps: float = 1e-5
    centre: float = 0.0
    spread: float = 1.0
    memory: str = "contiguous"
    gradients: bool = True
    tier: str = "core"

    def layout(self) -> None:
        return None


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 inputs and the cotangent `dy`; the first channel's weight is 0, as ResNet's last ones begin."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    channels = case.shape[3]
    inputs: dict[str, np.ndarray] = {
        "x": np.float32(case.centre) + np.float32(case.spread) * (normal(*case.shape) + normal(channels)),
        "weight": 1 + np.float32(0.3) * normal(channels),
        "bias": np.float32(0.5) * normal(channels),
        "dy": normal(*case.shape),
    }
    if channels > 1:
        inputs["weight"][0] = 0.0
    if case.frozen:
        inputs["mean"] = np.float32(case.centre) + np.float32(case.spread) * normal(channels)
        inputs["var"] = np.float32(case.spread**2) * (np.float32(0.5) + rng.random(channels, np.float32))
    if case.residual:
        inputs["residual"] = normal(*case.shape)
    if case.branch_scale is not None:
        inputs["branch_scale"] = np.asarray(case.branch_scale, np.float32)
    if case.act == "relu":
        for dtype in DTYPES:
            images = {name: _rounded(inputs[name], dtype) for name in ("x", "residual") if name in inputs}
            z, size = _pre_activation(case, inputs | images)
            inputs["dy"][np.abs(z) < KINK * size] = 0.0
    return inputs


def call(case: Case, layout: None, inputs: dict[str, Any], impl: str | None) -> tuple[Any, Any, Any]:
    """The op on arrays of any library: (y, mean, var)."""
    optional = {name: inputs.get(name) for name in ("mean", "var", "residual", "branch_scale")}
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    return batch_norm_act(x, weight, bias, **optional, eps=case.eps, act=case.act, impl=impl)


def flops(case: Case, direction: str) -> int:
    """Floating-point operations: an element costs 4 in the statistics, 4 in apply, 1 for scale, residual, relu each."""
    extra = case.residual + (case.branch_scale is not None) + (case.act == "relu")
    forward = (0 if case.frozen else 4) + 4 + extra
    backward = 5 + (2 if case.frozen else 6) + 2 * extra
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction] * math.prod(case.shape)


def bytes_moved(case: Case, direction: str, itemsize: int) -> int:
    """The traffic of the halves (docs/stem.md), each reading and writing its arrays once; [C] vectors are left out."""
    forward = (1 if case.frozen else 2) + case.residual + 1
    masked = case.residual and case.act == "relu"
    backward = (2 + 2 * masked) + 3
    passes = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    return passes * math.prod(case.shape) * itemsize


def floors(case: Case, inputs: dict[str, np.ndarray], dtype: str) -> dict[str, tuple[float, float]]:
    """For each output and gradient, the largest and the rms error that any implementation may add to the yardstick's.

    FLOOR times the formula with every term replaced by its absolute value, x - mean becoming |x| + |mean|: a float32
    mean is no better than that. The variance's is std · rms(x), what a one-pass (Welford) update loses and the textbook
    E[x²] - mean² does not keep to (Chan, Golub, LeVeque 1983, table 1).
    """
    x, w, b, dy, mean, var, scale, residual = _wide(case, inputs)
    axes, pixels = (0, 1, 2), max(math.prod(case.shape[:3]), 1)
    rstd = 1 / np.sqrt(var + case.eps)
    norm, norm_size = (x - mean) * rstd, (np.abs(x) + np.abs(mean)) * rstd
    z, z_size = _pre_activation(case, inputs)
    masked = np.abs(np.where((z > 0) | (case.act == "none"), dy, 0.0))
    dz = scale * masked
    dx = dz
    if not case.frozen:
        dx = dz + dz.sum(axes) / pixels + norm_size * (dz * np.abs(norm)).sum(axes) / pixels
        dx = dx + np.abs(norm) * (dz * norm_size).sum(axes) / pixels
    sizes = {
        "y": z_size,
        "mean": np.abs(x).sum(axes) / pixels,
        "var": np.sqrt(var * (x**2).sum(axes) / pixels),
        "dx": np.abs(w) * rstd * dx,
        "dweight": (dz * norm_size).sum(axes),
        "dbias": dz.sum(axes),
        "dresidual": masked,
    }
    return {
        name: (FLOOR * float(size.max()), FLOOR * math.sqrt(np.mean(size**2)))
        for name, size in sizes.items()
        if size.size
    }


def _pre_activation(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(z, the same with every term replaced by its absolute value), float64."""
    x, w, b, _, mean, var, scale, residual = _wide(case, inputs)
    rstd = 1 / np.sqrt(var + case.eps)
    z = scale * ((x - mean) * rstd * w + b) + residual
    return z, scale * ((np.abs(x) + np.abs(mean)) * rstd * np.abs(w) + np.abs(b)) + np.abs(residual)


def _wide(case: Case, inputs: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """(x, weight, bias, dy, mean, var, branch scale [B, 1, 1, 1], residual) in float64."""
    wide = {name: x.astype(np.float64) for name, x in inputs.items()}
    x, pixels = wide["x"], max(math.prod(case.shape[:3]), 1)
    mean = wide["mean"] if case.frozen else x.sum((0, 1, 2)) / pixels
    var = wide["var"] if case.frozen else ((x - mean) ** 2).sum((0, 1, 2)) / pixels
    scale = wide.get("branch_scale", np.ones(case.shape[0]))[:, None, None, None]
    return x, wide["weight"], wide["bias"], wide["dy"], mean, var, scale, wide.get("residual", np.zeros(1))


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to `dtype` and back; numpy has no bfloat16, so its bits are rounded to even by hand."""
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float32)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


# Channels and pixels at, one below and one above the block edges in use; C = 80 and 1280 are the Huge model's.
CASES: tuple[Case, ...] = (
    Case(name="smallest", shape=(1, 1, 1, 1)),
    *(Case(name=f"channels_{n}", shape=(2, 5, 3, n)) for n in (2, 3, 8, 15, 17, 31, 33, 63, 64, 65, 80, 127, 129, 257)),
    *(Case(name=f"pixels_{n}", shape=(1, 1, n, 24), residual=True) for n in (2, 15, 16, 17, 63, 65, 127, 129, 513)),
    Case(name="many_channels", shape=(2, 3, 3, 1024), residual=True, branch_scale=(1.25, 0.0)),
    Case(name="one_pixel", shape=(1, 1, 1, 64), residual=True),
    Case(name="one_pixel_an_image", shape=(7, 1, 1, 40), branch_scale=(1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 0.5)),
    Case(name="no_image", shape=(0, 4, 4, 8), residual=True, branch_scale=()),
    Case(name="plain", shape=(3, 6, 5, 48), act="none"),
    Case(name="residual", shape=(3, 6, 5, 48), residual=True),
    Case(name="residual_without_act", shape=(3, 6, 5, 48), residual=True, act="none"),
    Case(name="branch", shape=(3, 6, 5, 48), branch_scale=(1.25, 0.0, 1.25)),
    Case(name="branch_residual", shape=(3, 6, 5, 48), residual=True, branch_scale=(0.0, 1.25, 1.25)),
    Case(name="branch_all_dropped", shape=(2, 4, 5, 16), residual=True, branch_scale=(0.0, 0.0)),
    Case(name="frozen", shape=(3, 6, 5, 48), frozen=True),
    Case(name="frozen_plain", shape=(3, 6, 5, 48), frozen=True, act="none"),
    Case(name="frozen_branch_residual", shape=(3, 6, 5, 48), frozen=True, residual=True, branch_scale=(1.25, 0.0, 1.0)),
    Case(name="large_eps", shape=(2, 4, 4, 16), eps=0.5),
    Case(name="large_mean", shape=(4, 9, 8, 32), centre=100.0, spread=0.1),
    Case(name="large_mean_residual", shape=(4, 9, 8, 32), centre=-100.0, spread=0.1, residual=True),
    Case(name="large_mean_frozen", shape=(4, 9, 8, 32), centre=100.0, spread=0.1, frozen=True),
    Case(name="tiny_spread", shape=(2, 4, 4, 16), spread=1e-4),
    Case(name="channels_last", shape=(2, 4, 5, 24), residual=True, memory="channels_last"),
    Case(name="channels_last_pixel", shape=(3, 1, 1, 24), residual=True, memory="channels_last"),
    Case(
        name="strided_batch", shape=(3, 4, 5, 24), residual=True, branch_scale=(1.0, 0.0, 2.0), memory="strided_batch"
    ),
    Case(name="misaligned", shape=(2, 4, 5, 24), residual=True, memory="misaligned"),
    # the layers of the model variants at 224 × 224: base and large (64 · 2^i channels), huge (80 · 2^i)
    Case(name="base_stem", shape=(2, 112, 112, 64), tier="full"),
    Case(name="base_stage_1", shape=(2, 56, 56, 256), residual=True, branch_scale=(1.25, 0.0), tier="full"),
    Case(name="base_stage_2", shape=(2, 28, 28, 512), residual=True, tier="full"),
    Case(name="base_stage_3", shape=(4, 14, 14, 1024), residual=True, tier="full"),
    Case(name="huge_stem", shape=(1, 112, 112, 80), tier="full"),
    Case(name="huge_stage_3", shape=(2, 14, 14, 1280), residual=True, frozen=True, tier="full"),
)
