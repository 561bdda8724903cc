"""Random layouts against the naive oracle: empty and one-token sequences, all masked, NaN in padding and tail, odd
strides, misaligned pointers, every head_dim; forward and all gradients, float32 and 16 bits."""

from __future__ import annotations

import attention_oracle
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from simvlm.kernels import parity
from simvlm.kernels.attention import spec

LENGTHS = st.integers(0, 12) | st.integers(0, 12) | st.sampled_from([15, 16, 17, 47, 48, 49, 63, 64, 65, 130, 193])
"""Mostly short; sometimes about the edges of a kernel's tiles (48, 64) and chunks (192)."""
ORACLE_PAIRS = 1500
"""The naive loops take the short ones; float64 PyTorch, which agrees with them there, is the truth of the long ones."""


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny tensors: on more threads torch would spend its time at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def cases(draw) -> spec.Case:
    batch = draw(st.integers(0, 4))
    kind = draw(st.sampled_from(["bidirectional", "causal", "prefix", "cross", "decode"]))
    lens = st.lists(LENGTHS, min_size=batch, max_size=batch).map(tuple)
    q_lens = draw(lens)
    grid = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 14))) if kind != "cross" else None
    k_lens = prefix_lens = q_offsets = None
    if kind == "cross":
        k_lens = draw(lens)
    elif kind == "decode":
        q_offsets = draw(lens)
        k_lens = tuple(q + offset for q, offset in zip(q_lens, q_offsets, strict=True))
        prefix_lens = tuple(draw(st.integers(0, n)) for n in k_lens)
    elif kind == "causal":
        prefix_lens = 0
    elif kind == "prefix":
        prefix_lens = tuple(draw(st.integers(0, n)) for n in q_lens)
    longest_q, longest_k = max((*q_lens, 1)), max((*(k_lens or q_lens), 1))
    extra = draw(st.integers(0, 3))
    square = k_lens is None
    padded = (longest_q + extra, (longest_q if square else longest_k) + extra)
    return spec.Case(
        name="random",
        q_lens=q_lens,
        k_lens=k_lens,
        prefix_lens=prefix_lens,
        q_offsets=q_offsets,
        image_grid=grid,
        has_image=draw(st.lists(st.booleans(), min_size=batch, max_size=batch).map(tuple)) if grid else None,
        cross=kind == "cross",
        padded=padded if draw(st.booleans()) else None,
        tail=extra,
        heads=draw(st.integers(1, 2)),
        head_dim=8 * draw(st.integers(1, 16)),
        table=draw(st.booleans()),
        scale=draw(st.none() | st.floats(0.05, 0.5)),
        memory=draw(st.sampled_from(["contiguous", "fused" if square else "misaligned", "misaligned"])),
    )


def _check(case: spec.Case, seed: int, half: str) -> None:
    for dtype in ("float32", half):
        inputs = {
            name: parity.rounded(x, "float32" if name in parity.PARAMETERS else dtype)
            for name, x in spec.make_inputs(case, seed).items()
        }
        yardstick = parity.run(spec, case, inputs, "torch", "reference", dtype)
        floors = spec.floors(case, inputs, dtype)
        exact = parity.run(spec, case, inputs, "torch", "reference", "float64")
        kernel = parity.run(spec, case, inputs, "torch", "cpp", dtype)
        truth = exact
        if sum(q * k for q, k in zip(case.q_lens, case.k_lens or case.q_lens, strict=True)) <= ORACLE_PAIRS:
            truth = attention_oracle.on_case(case, inputs)
        for name, want in truth.items():
            attention_oracle.assert_same(exact[name], want, name)
            found = parity.compare(spec, name, dtype, kernel[name], want, yardstick[name], floors.get(name, (0.0, 0.0)))
            assert not found, str(found[0])


CHECKS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
ARGUMENTS = {"case": cases(), "seed": st.integers(0, 2**31), "half": st.sampled_from(["bfloat16", "float16"])}


@settings(max_examples=1000, **CHECKS)
@given(**ARGUMENTS)
def test_random_layouts(case, seed, half):
    _check(case, seed, half)


@pytest.mark.full
@settings(max_examples=10_000, **CHECKS | {"derandomize": False})
@given(**ARGUMENTS)
def test_ten_thousand_random_layouts(case, seed, half):
    _check(case, seed, half)
