"""What every test shares: poisoned memory, the interpreter for Triton, and the closing table of what ran where."""

from __future__ import annotations

import atexit
import collections
import os
import pathlib
import shutil
import tempfile

from nvidia_driver import has_gpu

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "0" if has_gpu() else "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch made deterministic refuses cuBLAS
# A mesh to test on. Most of the time of JAX's tests is compiling for the CPU; `make test-full` optimizes as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
# What one test has compiled no other compiles again, be it another process: workers inherit this folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="simvlm-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Test tensors are tiny: with more threads than one, two test processes would wait for each other at barriers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from sanitized import use_the_sanitized_module

from simvlm.train import tpu_plan

tpu_plan.set_environment()  # programs are compiled for TPUs that are not there
use_the_sanitized_module()

# torch.empty and new_empty come filled with NaN, so an output row that a kernel forgets is seen.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def task_world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The benchmarks' own world: see task_cases.py."""
    from task_cases import make_task_world  # here: `make test-xla` has none of what it imports

    return make_task_world(tmp_path_factory.mktemp("tasks"))


_outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
_reasons: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts parity cases by "op  family impl@level  dtype"; ids are written by tests/test_parity.py."""
    if "test_parity[" not in report.nodeid or (report.when != "call" and not report.skipped):
        return
    op, family, impl, dtype, _case = report.nodeid.partition("[")[2].rstrip("]").split("/")
    key = f"{op:17} {family:6} {impl:17} {dtype}"
    _outcomes[key][report.outcome] += 1
    if report.skipped and isinstance(report.longrepr, tuple):
        _reasons[key] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _outcomes:
        return
    terminalreporter.section("parity: what ran")
    for key, counts in sorted(_outcomes.items()):
        shown = ", ".join(
            f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[outcome]
        )
        terminalreporter.write_line(f"{key:52} {shown}" + (f" ({_reasons[key]})" if key in _reasons else ""))
    missing = _too_few()
    for line in missing:
        terminalreporter.write_line(line, red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _too_few() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _too_few() -> list[str]:
    """SIMVLM_MIN_PARITY="prefix_attention/torch/cpp=41x3 …": cases that must have passed, in that many dtypes.

    For every CPU level apart, where an implementation has several; a level that this processor lacks is skipped whole.
    """
    complaints = []
    for entry in os.environ.get("SIMVLM_MIN_PARITY", "").split():
        name, _, least = entry.partition("=")
        cases, dtypes = map(int, least.split("x"))
        variants: dict[str, int] = collections.Counter()
        for key, counts in _outcomes.items():
            op, family, impl, _dtype = key.split()
            if f"{op}/{family}/{impl.partition('@')[0]}" == name and set(counts) != {"skipped"}:
                variants[impl] += counts["passed"] >= cases
        if not variants:
            complaints.append(f"no parity case of {name} ran")
        for impl, enough in variants.items():
            if enough < dtypes:
                complaints.append(f"{name}: {impl} must pass {cases} parity cases in {dtypes} dtypes, did in {enough}")
    return complaints
