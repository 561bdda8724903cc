"""The one parity test: op × implementation × case × dtype, forward and every gradient, within the error budget."""

from __future__ import annotations

import itertools

import pytest

from simvlm.kernels import dispatch, implementations, parity, xla_device
from simvlm.kernels.attention import cpp_cpu
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.stem import batch_norm_spec, embed_spec

SPECS = {
    "prefix_attention": attention_spec,
    "batch_norm_act": batch_norm_spec,
    "embed_sequence": embed_spec,
}
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")

# Triton's interpreter needs some 3 ms a tile and gets bfloat16 wrong.
INTERPRETED_TILES = {"float32": 200, "float16": 40}

# XLA compiles every shape anew, for some two seconds; Pallas, interpreted, for five. So of attention in plain JAX all
# cases run in float32 and one of each kind in bfloat16; of Pallas one case of each kind that its tiles know.
XLA_16_BITS = (
    "smallest",
    "edges_prefix_table",
    "base_encoder",
    "decoder_only",
    "huge_heads",
    "captions_cross",
    "decode",
    "padded_ragged",
    "head_dim_128",
    "scaled",
)
_BOTH = ("float32", "bfloat16")
PALLAS = {
    "smallest": ("bfloat16",),
    "all_masked": ("float32",),
    "nobody": ("float32",),
    "padded_ragged": ("float32",),
    "edges_prefix_table": _BOTH,
    "base_encoder": _BOTH,
    "decoder_only": ("bfloat16",),
    "huge_heads": _BOTH,
    "captions_cross": ("float32",),
    "decode": ("bfloat16",),
    "beams": ("float32",),
    "keys_apart": ("bfloat16",),
}


def _is_torch_xla(status: dispatch.Status) -> bool:
    return (status.family, status.name) == ("torch", "xla")


def _variants(status: dispatch.Status) -> list[str]:
    if _is_torch_xla(status):
        return ["xla@cpu-tensors"]
    if status.name != "cpp" or status.family == "jax":  # XLA's door leads to the same kernels as Python's: one level
        return [status.name]
    return [f"cpp@{level}" for level in CPU_LEVELS]


def _dtypes(spec, family: str, impl: str, case) -> tuple[str, ...]:
    if impl == "triton":
        return tuple(
            dtype for dtype, most in INTERPRETED_TILES.items() if spec is not attention_spec or _tiles(case) <= most
        )
    if family == "jax" and case.memory != "contiguous":
        return ()
    if impl == "pallas":
        return PALLAS.get(case.name, ())
    if family == "jax" and impl != "cpp":
        few = spec is attention_spec and case.tier == "core" and case.name not in XLA_16_BITS
        return ("float32",) if few else ("float32", "bfloat16")
    return spec.DTYPES


def _tiles(case) -> int:
    """Of attention: tiles of 16 × 16 and 64 × 64 that a kernel may walk, forward and twice backward."""
    k_lens = case.q_lens if case.k_lens is None else case.k_lens
    pairs = sum(-(-q // 32) * -(-k // 32) for q, k in zip(case.q_lens, k_lens, strict=True))
    return 3 * pairs * case.heads


def _cases():
    """Case by case and dtype by dtype, so that truth and yardstick are computed once for all implementations."""
    for op, spec in SPECS.items():
        statuses = implementations(op)
        for case, dtype in itertools.product(spec.CASES, spec.DTYPES):
            for status in statuses:
                if dtype not in _dtypes(spec, status.family, status.name, case):
                    continue
                for variant in _variants(status):
                    yield pytest.param(
                        spec,
                        case,
                        status,
                        variant,
                        dtype,
                        id=f"{op}/{status.family}/{variant}/{dtype}/{case.name}",
                        marks=[pytest.mark.full] if case.tier == "full" else [],
                    )


@pytest.fixture
def cpu_level():
    """Chooses a CPU level of the C++ kernels for one test, or skips where this processor lacks it."""
    chosen = []

    def choose(level: str) -> None:
        from simvlm import _cpp

        if not dict(_cpp.levels()).get(level):
            pytest.skip(f"this processor does not run {level}")
        _cpp.select_level(level)
        chosen.append(_cpp)

    yield choose
    for module in chosen:
        module.select_level(None)


def take_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the torch-xla implementation, plain torch operations, take CPU tensors; `make test-xla` has XLA's."""
    monkeypatch.setattr(xla_device, "unavailable", lambda: None)
    monkeypatch.setattr(xla_device, "unsupported", lambda name, x: None)


@pytest.mark.parametrize(("spec", "case", "status", "variant", "dtype"), _cases())
def test_parity(spec, case, status, variant, dtype, cpu_level, monkeypatch):
    if _is_torch_xla(status):
        take_cpu_tensors(monkeypatch)
    elif not status.available and status.name != "pallas":  # which is, once it is interpreted
        pytest.fail(f"{status.name} ought to run here: {status.reason}")
    elif "@" in variant:
        cpu_level(variant.partition("@")[2])
    found = parity.violations(spec, case, status.family, status.name, dtype)
    assert not found, "\n".join(map(str, found))


def test_the_cpu_levels_are_those_compiled():
    from simvlm import _cpp

    assert [level for level, _ in _cpp.levels()] == list(CPU_LEVELS)
    assert cpp_cpu.unavailable() is None
