"""Does an implementation meet the error budget of docs/contract.md §4? Asked by the tests and before every timing.

Truth is the reference in float64 on inputs already rounded to the dtype under test, the yardstick the reference in that
dtype, and a kernel passes where, for the largest error and for its rms,
`err(kernel) <= ratio · err(yardstick) + floor`. No tolerance is written anywhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
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


def violations(
    spec: ModuleType, case: Any, family: str, impl: str | None, dtype: str, seed: int = 0
) -> list[Violation]:
    """Every array, forward and gradient, in which `impl` misses the budget on `case`; empty when it meets it."""
    inputs = rounded_inputs(spec, case, dtype, seed)
    return judged(spec, case, dtype, run(spec, case, inputs, family, impl, dtype), seed)


def judged(spec: ModuleType, case: Any, dtype: str, got: dict[str, np.ndarray], seed: int = 0) -> list[Violation]:
    """Every array of `got`, float64 and computed anywhere from `rounded_inputs`, that misses the budget."""
    truth, yardstick, floors = _expected(spec, case, dtype, seed)
    found = []
    for name, value in got.items():
        found += compare(spec, name, dtype, value, truth[name], yardstick[name], floors.get(name, (0.0, 0.0)))
    return found


def run(
    spec: ModuleType, case: Any, inputs: dict[str, np.ndarray], family: str, impl: str | None, dtype: str
) -> dict[str, np.ndarray]:
    """Outputs and gradients (`dq` for input `q`) of one implementation, as float64 arrays."""
    runner = {"torch": _run_torch, "jax": _run_jax, "numpy": _run_numpy}[family]
    return runner(spec, case, inputs, impl, dtype)


@functools.lru_cache(maxsize=64)
def _expected(spec: ModuleType, case: Any, dtype: str, seed: int) -> tuple[Any, Any, dict[str, tuple[float, float]]]:
    inputs = rounded_inputs(spec, case, dtype, seed)
    truth = run(spec, case, inputs, "torch", "reference", "float64")
    yardstick = run(spec, case, inputs, "torch", "reference", dtype)
    return truth, yardstick, spec.floors(case, inputs, dtype)


def forget() -> None:
    """Frees the inputs, truths and yardsticks that `violations` keeps of the cases it was asked about."""
    _expected.cache_clear()


PARAMETERS = ("rel_bias", "dlse", "weight", "bias", "image_positions", "mean", "var", "branch_scale")
"""Inputs that stay float32 whatever the dtype under test: parameters and cotangents of float32 outputs."""


@functools.lru_cache(maxsize=64)
def rounded_inputs(spec: ModuleType, case: Any, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The case's inputs as float32 arrays whose values `dtype` holds exactly; not to be written to."""
    return {
        name: rounded(x, "float32" if name in PARAMETERS else dtype) for name, x in spec.make_inputs(case, seed).items()
    }


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` holds exactly."""
    return torch.from_numpy(x).to(DTYPES[dtype]).float().numpy() if dtype != "float64" else x


def compare(
    spec: ModuleType,
    name: str,
    dtype: str,
    got: np.ndarray,
    truth: np.ndarray,
    yardstick: np.ndarray,
    floor: tuple[float, float],
) -> list[Violation]:
    """The budget on one array: its largest error and the rms of its error, against the yardstick's."""
    if got.shape != truth.shape:
        return [Violation(name, f"shape {got.shape} instead of {truth.shape};", math.inf, 0.0)]
    finite = np.isfinite(truth)
    wrong = ~np.where(finite, np.isfinite(got), got == truth)  # -inf of an empty row must be -inf; NaN is nowhere right
    if wrong.any():
        return [Violation(name, f"non-finite pattern, {int(wrong.sum())} elements,", math.inf, 0.0)]
    if not finite.any():
        return []
    error, honest = got[finite] - truth[finite], yardstick[finite] - truth[finite]
    largest, rms = lambda e: float(np.abs(e).max()), lambda e: float(np.sqrt(np.mean(e**2)))
    found = []
    for label, measure, ratio, room in (
        ("largest", largest, spec.RATIO_MAX[dtype], floor[0]),
        ("rms", rms, spec.RATIO_RMS[dtype], floor[1]),
    ):
        assert math.isfinite(measure(honest)), f"the yardstick itself overflows in {name}: choose smaller inputs"
        limit = ratio * measure(honest) + room
        if not measure(error) <= limit:
            found.append(Violation(name, label, measure(error), limit))
    return found


def _run_torch(
    spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str
) -> dict[str, np.ndarray]:
    layout = case.layout()
    device = "cpu"
    if impl == "triton" and torch.cuda.is_available():
        device = "cuda"
    if impl == "xla" and importlib.util.find_spec("torch_xla") is not None:
        device = "xla"
    layout = layout if layout is None or device == "cpu" else layout.to(device)
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
        seeded = [name for name in spec.OUTPUTS if f"d{name}" in tensors]
        cotangents = [tensors[f"d{name}"].to(result[name].dtype) for name in seeded]
        grads = torch.autograd.grad([result[name] for name in seeded], [leaves[name] for name in names], cotangents)
        result |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    if device == "xla":
        import torch_xla

        torch_xla.sync()  # one program, not one for each array that is asked for
    return {name: x.detach().cpu().double().numpy() for name, x in result.items()}


def arrange(tensors: dict[str, torch.Tensor], memory: str) -> dict[str, torch.Tensor]:
    """The same values, laid in memory as `Case.memory` says."""
    if memory == "fused":
        fused = torch.stack([tensors[name] for name in ("q", "k", "v")], dim=-3)
        return tensors | {name: fused.select(-3, index) for index, name in enumerate(("q", "k", "v"))}
    if memory == "shared_heads":
        return tensors | {name: tensors[name][..., :1, :].expand_as(tensors[name]) for name in ("k", "v")}
    if memory in _LAYINGS:
        return {name: _LAYINGS[memory](x) for name, x in tensors.items()}
    return dict(tensors)


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """An image as it comes out of torch's convolutions: a view of [B, C, Hh, Ww] in channels_last memory."""
    if x.ndim != 4:
        return x
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _strided_batch(x: torch.Tensor) -> torch.Tensor:
    """Every other image of an array twice the size, NaN between."""
    if x.ndim != 4:
        return x
    room = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
    room[::2] = x
    return room[::2]


_LAYINGS = {"misaligned": _misaligned, "channels_last": _channels_last, "strided_batch": _strided_batch}


def _run_jax(
    spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str
) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    layout = case.layout()
    arrays = {name: jnp.asarray(x, "float32" if name in PARAMETERS else dtype) for name, x in inputs.items()}
    names = [name for name in spec.DIFFERENTIABLE if name in arrays] if case.gradients else []

    @jax.jit
    def op(layout: Any, leaves: dict[str, Any], cotangents: Any) -> Any:
        outputs, pull = jax.vjp(lambda leaves: spec.call(case, layout, arrays | leaves, impl), leaves)
        pairs = zip(cotangents, outputs, strict=True)
        return outputs, pull(tuple(jnp.broadcast_to(c, o.shape).astype(o.dtype) for c, o in pairs))

    # Outputs without a cotangent (statistics) get zero.
    cotangents = tuple(arrays.get(f"d{name}", jnp.zeros(())) for name in spec.OUTPUTS)
    with _interpreted(impl):
        outputs, (grads,) = op(layout, {name: arrays[name] for name in names}, cotangents)
    result = dict(zip(spec.OUTPUTS, outputs, strict=True)) | {f"d{name}": grads[name] for name in names}
    return {name: np.asarray(x).astype(np.float64) for name, x in result.items()}


def _interpreted(impl: str | None) -> contextlib.AbstractContextManager[Any]:
    """Where there is no TPU, Pallas kernels run in an interpreter."""
    import jax

    if impl != "pallas" or jax.default_backend() == "tpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    # True: the kernels become XLA programs, in half the time of the one that simulates a TPU's memories.
    return pltpu.force_tpu_interpret_mode(True)  # type: ignore[arg-type]


def _run_numpy(
    spec: Any, case: Any, inputs: dict[str, np.ndarray], impl: str | None, dtype: str
) -> dict[str, np.ndarray]:
    outputs = spec.call(case, case.layout(), numpy_arrays(inputs, dtype), impl)
    return {name: x.astype(np.float64) for name, x in zip(spec.OUTPUTS, outputs, strict=True)}


def numpy_arrays(inputs: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The inputs as a numpy caller holds them: of `dtype`, parameters of float32."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    return {name: x.astype(np.float32 if name in PARAMETERS else kind) for name, x in inputs.items()}
