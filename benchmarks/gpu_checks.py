"""What `python -m benchmarks.gpu` proves before it compares: parity, repeats, tests, the first call, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import attention_cases, bench_attention, machine
from benchmarks.attention_problem import Problem
from benchmarks.goals import MEMORY_GROWTH
from benchmarks.gpu_run import PROCESSES, NeedsError, Run, context_is_lost, in_processes
from benchmarks.record import one_line
from simvlm.kernels import PrefixLayout, parity, prefix_attention
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.stem import batch_norm_spec, embed_spec

SPECS = {"prefix_attention": attention_spec, "batch_norm_act": batch_norm_spec, "embed_sequence": embed_spec}
REPEATS = 30
TESTS = Path("tests/test_gpu.py")
PARITY_S, TESTS_S, COLD_S = 180, 150, 60
"""The most seconds that parity, the tests and the fresh process may take."""
LENGTHS: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
"""of the sequence whose peak memory is measured."""


def check_parity(run: Run) -> None:
    """Every core case of every op; in processes, because what takes long is to compile some hundred kernels."""
    dtypes = ("float32", "float16") if run.dry else ("float32", "bfloat16", "float16")
    jobs = [
        (op, case.name, dtypes)
        for op, spec in SPECS.items()
        for case in [case for case in spec.CASES if case.tier == "core"][: 2 if run.dry else None]
    ]
    found, missing = in_processes(misses, jobs, 1 if run.dry else PROCESSES, PARITY_S)
    red = [line for lines in found for line in lines]
    run.report["parity"] = {"cases": len(found), "not_judged": missing, "dtypes": dtypes, "red": red}
    if red:
        raise AssertionError(f"{len(red)} misses of the error budget, one of them: {red[0]}")
    if missing:
        raise AssertionError(f"{missing} of {len(jobs)} cases were not judged in {PARITY_S} s")


_lost_at: list[str] = []
"""Where a fault has made the GPU useless to this process: what follows says nothing about its own kernels."""


def misses(job: tuple[str, str, tuple[str, ...]]) -> list[str]:
    """Where Triton misses the budget on one case: (op, case, dtypes)."""
    torch.set_num_threads(1)
    op, name, dtypes = job
    spec = SPECS[op]
    case = next(case for case in spec.CASES if case.name == name)
    found = []
    for dtype in dtypes:
        if _lost_at:
            found.append(f"{op} {name} {dtype}: not judged after the fault of {_lost_at[0]}")
            continue
        try:
            red = [str(violation) for violation in parity.violations(spec, case, "torch", "triton", dtype)]
        except Exception as error:  # a kernel that fails is a row too
            red = [one_line(error)]
            if torch.cuda.is_available() and context_is_lost():
                _lost_at.append(f"{op} {name} {dtype}")
        found += [f"{op} {name} {dtype}: {line}" for line in red]
    return found


def check_repeats(run: Run) -> None:
    """Forward and backward of one case, again and again: the same bits."""
    name, repeats = ("grid_row", 2) if run.dry else ("gpu_pretrain", REPEATS)
    different = []
    for dtype in ("float32",) if run.dry else ("float32", "bfloat16", "float16"):
        call = both_ways(name, dtype, run.device)
        first = call()
        for _ in range(repeats - 1):
            if not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)):
                different.append(dtype)
                break
    run.report["repeats"] = {"case": name, "repeats": repeats, "different": different}
    if different:
        raise AssertionError(f"repeats differ in {', '.join(different)}")


def both_ways(name: str, dtype: str, device: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward of ours on a case: (out, gradients)."""
    problem = Problem(attention_cases.named(name), dtype, device)
    call: Callable[[], tuple[torch.Tensor, ...]] = bench_attention.contestant(
        problem, "both", bench_attention.public("triton"), "ours"
    ).call
    return call


def run_tests(run: Run) -> None:
    """The tests that want a GPU, in a process of their own, outside the interpreter."""
    if not (machine.ROOT / TESTS).exists():
        raise NeedsError(str(TESTS))
    # The tests' conftest turns the interpreter on where nothing else is said, and makes torch deterministic, which
    # cuBLAS is with a workspace of fixed size alone.
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-v", str(TESTS), "-p", "no:cacheprovider", f"--junitxml={found}"]
        try:
            done = subprocess.run(
                command,
                cwd=machine.ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TESTS_S,
            )
        except subprocess.TimeoutExpired as error:
            told = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode(errors="replace")
            run.report["tests_not_done"] = told.splitlines()[-40:]
            last = next((line for line in reversed(told.splitlines()) if line.strip()), "the start")
            raise RuntimeError(f"not done after {TESTS_S} s, at: {last}") from None
        if not found.exists():
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        cases = list(ET.parse(found).getroot().iter("testcase"))
    red = [
        f"{case.get('name')}" for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(red) - skipped
    run.report["tests"] = {"passed": passed, "failed": red, "skipped": skipped}
    if red:
        raise AssertionError(f"{len(red)} of {len(cases)} tests failed, the first: {red[0]}")
    if not run.dry and not passed:
        raise AssertionError(f"no test ran: {skipped} skipped")


_COLD = """
import time
from benchmarks import gpu_checks
started = time.perf_counter()
call = gpu_checks.both_ways({name!r}, {dtype!r}, {device!r})
ready = time.perf_counter()
call()
if {device!r} == "cuda":
    import torch
    torch.cuda.synchronize()
print(ready - started, time.perf_counter() - ready)
"""


def time_cold_start(run: Run) -> None:
    """Seconds of the first call, forward and backward, in a fresh process whose Triton cache is empty."""
    name, dtype = ("grid_row", "float32") if run.dry else ("gpu_pretrain", "bfloat16")
    with tempfile.TemporaryDirectory() as cache:
        program = _COLD.format(name=name, dtype=dtype, device=run.device)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=machine.ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
            timeout=COLD_S,
        )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    preparation, first_call = map(float, done.stdout.split()[-2:])
    run.report["cold_start"] = {"case": name, "dtype": dtype, "preparation_s": preparation, "first_call_s": first_call}


def measure_memory(run: Run) -> None:
    """Peak of forward and backward over what was there before, one sequence, an image of 14 × 14 patches and text."""
    lengths, grid, heads, dtype = LENGTHS, (14, 14), 12, torch.bfloat16
    if run.dry:
        lengths, grid, heads, dtype = (32, 64), (3, 4), 2, torch.float32
    peaks = {length: _peak_mib(length, grid, heads, dtype, run.device) for length in lengths}
    shortest, longest = peaks[lengths[0]], peaks[lengths[-1]]
    growth = None
    if not run.dry and shortest and longest:
        # Nothing is subtracted: what does not depend on T is at home in the shortest too.
        growth = longest / shortest / (lengths[-1] / lengths[0])
    run.report["memory"] = {"heads": heads, "head_dim": 64, "peak_extra_mib": peaks, "growth": growth}
    if growth is not None and growth > MEMORY_GROWTH:
        raise AssertionError(f"memory grows {growth:.2f} times as fast as T (at most {MEMORY_GROWTH})")


def _peak_mib(length: int, grid: tuple[int, int], heads: int, dtype: torch.dtype, device: str) -> float | None:
    patches = grid[0] * grid[1]
    prefix = (patches + length) // 2
    layout = PrefixLayout.padded(1, length, prefix_lens=prefix, image_grid=grid).to(device)
    q, k, v, dout = (torch.randn(1, length, heads, 64, dtype=dtype, device=device) for _ in range(4))
    leaves = [q, k, v, torch.randn(heads, 2 * grid[0] - 1, 2 * grid[1] - 1, device=device)]
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> tuple[torch.Tensor, ...]:
        out = prefix_attention(q, k, v, layout, rel_bias=leaves[3], impl="triton")
        return (out, *torch.autograd.grad(out, leaves, dout))

    call()
    return machine.peak_extra_mib(call, device)
