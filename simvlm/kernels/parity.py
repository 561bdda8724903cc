"""Does an implementation meet the error budget of docs/contract.md §4? Asked by the tests and before every timing.

Truth is the reference in float64 on inputs already rounded to the dtype under test, the yardstick the reference in that
dtype, and a kernel passes where, for the largest error and for its rms,
`err(kernel) <= ratio · err(yardstick) + floor`. No tolerance is written anywhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Violation:
    """One array whose error exceeds its limit."""

    array: str
    measure: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.array}: {self.measure} error {self.error:.3g} > {self.limit:.3g}"


def violations(spec: ModuleType, case: Any, family: str, impl: str | None, dtype: str, seed: int = 0) -> list[Violation]:
    """Every array, forward and gradient, in which `impl` misses the budget on `case`; empty when it meets it."""
    inputs, truth, yardstick, magnitudes = _expected(spec, case, dtype, seed)
    got = run(spec, case, inputs, family, impl, dtype)
    found = []
    for name, value in got.items():
        ratios = getattr(spec, "WIDER", {}).get((dtype, name), (spec.RATIO_MAX[dtype], spec.RATIO_RMS[dtype]))
        found += _compare(name, value, truth[name], yardstick[name], ratios, spec.FLOOR * magnitudes[name])
    return found


def run(
    spec: ModuleType, case: Any, inputs: dict[str, np.ndarray], family: str, impl: str | None, dtype: str
) -> dict[str, np.ndarray]:
    """Outputs and gradients (`dq` for input `q`) of one implementation, as float64 arrays."""
    runner = {"torch": _run_torch, "jax": _run_jax, "numpy": _run_numpy}[family]
    return runner(spec, case, inputs, impl, dtype)


@functools.lru_cache(maxsize=64)
def _expected(spec: ModuleType, case: Any, dtype: str, seed: int) -> tuple[Any, Any, Any, dict[str, float]]:
    inputs = {name: rounded(x, dtype if name not in PARAMETERS else "float32") for name, x in spec.make_inputs(case, seed).items()}
    truth = run(spec, case, inputs, "torch", "reference", "float64")
    yardstick = run(spec, case, inputs, "torch", "reference", dtype)
    return inputs, truth, yardstick, spec.magnitudes(case, inputs)


PARAMETERS = ("rel_bias", "dlse", "weight", "bias", "image_positions")
"""Inputs that stay float32 whatever the dtype under test: parameters and cotangents of float32 outputs."""


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` holds exactly."""
    return torch.from_numpy(x).to(DTYPES[dtype]).float().numpy() if dtype != "float64" else x


def _compare(
    name: str, got: np.ndarray, truth: np.ndarray, yardstick: np.ndarray, ratios: tuple[float, float], floor: float
) -> list[Violation]:
    if got.shape != truth.shape:
        return [Violation(name, f"shape {got.shape} instead of {truth.shape};", math.inf, 0.0)]
    finite = np.isfinite(truth)
    wrong = ~np.where(finite, np.isfinite(got), got == truth)  # -inf of an empty row must be -inf; NaN is nowhere right
    if wrong.any():
        return [Violation(name, f"non-finite pattern, {int(wrong.sum())} elements,", math.inf, 0.0)]
    if not finite.any():
        return []
    error, honest = got[finite] - truth[finite], yardstick[finite] - truth[finite]
    measures = (("largest", lambda e: float(np.abs(e).max())), ("rms", lambda e: float(np.sqrt(np.mean(e**2)))))
    found = []
    for (label, measure), ratio in zip(measures, ratios, strict=True):
        limit = ratio * measure(honest) + floor
        if not measure(error) <= limit:
            found.append(Violation(name, label, measure(error), limit))
    return found


def _run_torch(spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str) -> dict[str, np.ndarray]:
    layout = case.layout()
    device = "cpu"
    if impl == "triton" and torch.cuda.is_available():
        device, layout = "cuda", layout.to("cuda")
    wide = DTYPES["float64" if dtype == "float64" else "float32"]
    tensors = {
        name: torch.from_numpy(x.copy()).to(wide if name in PARAMETERS else DTYPES[dtype]).to(device)
        for name, x in inputs.items()
    }
    arranged = arrange(tensors, case.memory)
    names = [name for name in spec.DIFFERENTIABLE if name in tensors] if case.gradients else []
    leaves = {name: arranged[name].detach().requires_grad_(name in names) for name in arranged}
    outputs = spec.call(case, layout, leaves, impl)
    result = dict(zip(spec.OUTPUTS, outputs, strict=True))
    if names:
        cotangents = [tensors[f"d{name}"].to(result[name].dtype) for name in spec.OUTPUTS]
        grads = torch.autograd.grad(list(outputs), [leaves[name] for name in names], cotangents)
        result |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: x.detach().cpu().double().numpy() for name, x in result.items()}


def arrange(tensors: dict[str, torch.Tensor], memory: str) -> dict[str, torch.Tensor]:
    """The same values, laid in memory as `Case.memory` says."""
    if memory == "fused":
        fused = torch.stack([tensors[name] for name in ("q", "k", "v")], dim=-3)
        return tensors | {name: fused.select(-3, index) for index, name in enumerate(("q", "k", "v"))}
    if memory == "shared_heads":
        return tensors | {name: tensors[name][..., :1, :].expand_as(tensors[name]) for name in ("k", "v")}
    if memory == "misaligned":
        return {name: _misaligned(x) for name, x in tensors.items()}
    return dict(tensors)


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


def _run_jax(spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    layout = case.layout()
    arrays = {name: jnp.asarray(x, "float32" if name in PARAMETERS else dtype) for name, x in inputs.items()}
    names = [name for name in spec.DIFFERENTIABLE if name in arrays] if case.gradients else []

    @jax.jit
    def op(layout: Any, leaves: dict[str, Any], cotangents: Any) -> Any:
        outputs, pull = jax.vjp(lambda leaves: spec.call(case, layout, arrays | leaves, impl), leaves)
        return outputs, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))

    outputs, (grads,) = op(
        layout, {name: arrays[name] for name in names}, tuple(arrays[f"d{name}"] for name in spec.OUTPUTS)
    )
    result = dict(zip(spec.OUTPUTS, outputs, strict=True)) | {f"d{name}": grads[name] for name in names}
    return {name: np.asarray(x).astype(np.float64) for name, x in result.items()}


def _run_numpy(spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str) -> dict[str, np.ndarray]:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    arrays = {name: x.astype(np.float32 if name in PARAMETERS else kind) for name, x in inputs.items()}
    outputs = spec.call(case, case.layout(), arrays, impl)
    return {name: x.astype(np.float64) for name, x in zip(spec.OUTPUTS, outputs, strict=True)}
