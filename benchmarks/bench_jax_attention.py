"""`prefix_attention` for JAX on the CPU: the C++ kernels through XLA's door, against the same kernels called by torch.

The difference between those two is what JAX pays for the door. Beside them stand plain JAX (ours, `xla`) and
`jax.nn.dot_product_attention`, jitted, with the dense mask and bias that the op spares. Threads are as many for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import bench_attention
from benchmarks.attention_cases import named
from benchmarks.attention_problem import Problem
from benchmarks.bench_attention import DTYPES_TIMED, described
from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, first_line, record
from simvlm.kernels import parity, prefix_attention
from simvlm.kernels.attention import spec
from simvlm.kernels.attention.table import IMPLS

OP = "jax_attention"
CASES = ("pretrain",)
TORCH = "simvlm cpp, torch"

Attend = Callable[..., Any]
"""(q, k, v, table or None, prepared) → out, jax arrays as the case stores them."""


def bench_jax_attention(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    if settings.device != "cpu":
        pytest.skip("the C++ kernels run on the CPU")
    found = named(case)
    problem = Problem(found, dtype, "cpu")
    subject = Subject(
        op=OP,
        case=case,
        shape=described(found),
        dtype=dtype,
        direction=direction,
        flops=spec.flops(found, direction),
        bytes_moved=spec.bytes_moved(found, direction, parity.DTYPES[dtype].itemsize),
        flops_formula=first_line(spec.flops),
        bytes_formula=first_line(spec.bytes_moved),
    )
    rows, refused, red = contestants(problem, direction)
    record(benchmark, stopwatch, settings, subject, rows, refused)
    if red:
        pytest.fail(f"{OP}: misses its error budget and gets no time: {'; '.join(red)}", pytrace=False)


def contestants(problem: Problem, direction: str) -> tuple[list[Contestant], list[tuple[str, str, str]], list[str]]:
    """Who takes part (ours first), the rows without a time, and what is red."""
    found: list[Contestant] = []
    refused: list[tuple[str, str, str]] = []
    red: list[str] = []
    for impl in IMPLS:
        if impl.family != "jax" or impl.unavailable() is not None:
            continue
        name = f"simvlm {impl.name}"
        misses = parity.violations(spec, problem.case, "jax", impl.name, problem.dtype)
        if misses:
            red.append(f"{impl.name}: {', '.join(map(str, misses))}")
            refused.append((name, "ours", f"no time: misses the error budget ({misses[0]})"))
        else:
            what = f"jax.jit of prefix_attention(impl={impl.name!r})"
            found.append(contestant(problem, direction, name, what, "ours", _public(problem, impl.name)))
    torch_row = bench_attention.contestant(problem, direction, bench_attention.public("cpp"), "variant")
    found.append(dataclasses.replace(torch_row, name=TORCH, what="the same kernels on torch tensors"))
    if problem.case.padded is not None:
        what = "jax.jit of jax.nn.dot_product_attention; every call spreads the table and adds the mask"
        parts = _mask_and_index(problem)
        built = contestant(problem, direction, "dot_product, bias built", what, "peer", _bias_built(problem), parts)
        found.append(built)
        if direction == "forward":
            what = "the same; the dense mask + bias was built before, as if it cost nothing"
            table = None if problem.table is None else _jax(problem.table)
            ready = _bias(table, problem.dtype, *parts)
            name, attend = "dot_product, bias ready", _bias_ready(problem)
            found.append(contestant(problem, direction, name, what, "peer", attend, ready))
    return found, refused, red


def contestant(
    problem: Problem, direction: str, name: str, what: str, kind: str, attend: Attend, prepared: Any = None
) -> Contestant:
    """`call` returns (out,) or (out, dq, dk, dv[, dtable]) of one jitted program, when they are there.

    Args:
        prepared: arrays made once a batch; the program's arguments, for XLA computes with constants as it compiles.
    """
    arrays = {name: _jax(x) for name, x in problem.stored.items()}
    leaves = [arrays[name] for name in ("q", "k", "v", "rel_bias") if name in arrays]

    def forward(prepared: Any, *leaves: Any) -> Any:
        q, k, v, *table = leaves
        return attend(q, k, v, table[0] if table else None, prepared)

    @jax.jit
    def program(prepared: Any, dout: Any, *leaves: Any) -> tuple[Any, ...]:
        if direction == "forward":
            return (forward(prepared, *leaves),)
        out, pull = jax.vjp(functools.partial(forward, prepared), *leaves)
        return (out, *pull(dout))

    def call() -> tuple[Any, ...]:
        return jax.block_until_ready(program(prepared, arrays["dout"], *leaves))

    def error(result: tuple[Any, ...]) -> float:
        return problem.error(torch.from_numpy(np.array(result[0], np.float32)), packed=True)

    return Contestant(name=name, what=what, kind=kind, call=call, error=error)


def _public(problem: Problem, impl: str) -> Attend:
    layout, scale = problem.case.layout(), problem.case.scale
    return lambda q, k, v, table, _: prefix_attention(q, k, v, layout, rel_bias=table, scale=scale, impl=impl)


def _bias_built(problem: Problem) -> Attend:
    def attend(q: Any, k: Any, v: Any, table: Any, prepared: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias=_bias(table, q.dtype, *prepared), scale=problem.scale)

    return attend


def _bias_ready(problem: Problem) -> Attend:
    def attend(q: Any, k: Any, v: Any, table: Any, prepared: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, bias=prepared, scale=problem.scale)

    return attend


def _mask_and_index(problem: Problem) -> tuple[Any, Any]:
    index = None if problem.bias_index is None else jnp.asarray(problem.bias_index.numpy(), jnp.int32)
    return jnp.asarray(problem.mask.numpy())[:, None], index


def _bias(table: Any, dtype: Any, mask: Any, index: Any) -> Any:
    """[B, N or 1, T, S]: the table spread over pairs of patches where seen, -inf elsewhere."""
    if table is None or index is None:
        return jnp.where(mask, jnp.zeros((), dtype), -jnp.inf)
    flat = jnp.pad(table.reshape(len(table), -1), ((0, 0), (0, 1)))
    return jnp.where(mask, jnp.moveaxis(flat[:, index], 0, 1).astype(dtype), -jnp.inf)


def _jax(x: torch.Tensor) -> Any:
    return jnp.asarray(x.float().numpy(), str(x.dtype).removeprefix("torch."))


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    return [
        (name, dtype, direction)
        for name in cases or CASES
        for dtype in dtypes or DTYPES_TIMED
        for direction in (("forward", "both") if named(name).gradients else ("forward",))
    ]
