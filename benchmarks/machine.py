"""What a result was measured on, and the three things asked of the machine: time, memory, and how fast it is today."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Timer, wall_clock
from simvlm.kernels import OPS, implementations

ROOT = Path(__file__).resolve().parent.parent
YARDSTICK = {"cpu": 2048, "cuda": 8192}
"""Side of the plain matrix product that says what this machine does in this dtype at this moment."""


def slug(device: str) -> str:
    """The name of a results folder: `cpu-amd-epyc-2core`, `gpu-nvidia-h100-80gb-hbm3`."""
    if device == "cuda":
        return f"gpu-{_dashed(torch.cuda.get_device_name())}"
    return f"cpu-{_dashed(cpu_model())}-{os.cpu_count()}core"


def device_of(slug: str) -> str:
    """ "cuda" or "cpu"."""
    return "cuda" if slug.startswith("gpu") else "cpu"


def _dashed(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|@.*|\b\d+-core\b|\b(processor|cpu)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def facts(device: str) -> dict[str, Any]:
    """Device, processor, threads, versions and implementations. No host name: results are public."""
    return {
        "slug": slug(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": _versions(device),
        "implementations": {
            op: {f"{status.name} ({status.family})": status.reason or "available" for status in implementations(op)}
            for op in OPS
        },
    }


def _versions(device: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("simvlm", "torch", "triton", "jax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return versions


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files under version control differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def timer(device: str) -> Timer:
    """How one call is timed: wall clock on a CPU; on a GPU events on the stream, launches included, L2 cache cold."""
    return _events if device == "cuda" else wall_clock


@functools.cache
def _larger_than_l2() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def _events(call: Callable[[], Any]) -> float:
    _larger_than_l2().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def matmul_gflops(dtype: torch.dtype, device: str, repeats: int) -> float:
    """GFLOP/s of a plain square matrix product, median of a few."""
    side = YARDSTICK[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    time_call = timer(device)
    time_call(lambda: a @ b)
    return 2e-9 * side**3 / statistics.median(time_call(lambda: a @ b) for _ in range(repeats))


def yardsticks(dtype: torch.dtype, device: str, repeats: int) -> dict[str, float]:
    """How fast the machine is at this moment: what a contest's times are to be compared with."""
    found = {
        "matmul_gflops": matmul_gflops(dtype, device, repeats),
        "copy_gbytes_per_s": copy_gbytes_per_s(device, repeats),
    }
    if device == "cpu":
        found["matmul_one_thread_gflops"] = found["matmul_gflops"]
        if torch.get_num_threads() > 1:
            with threads(1):
                found["matmul_one_thread_gflops"] = matmul_gflops(dtype, device, repeats)
        peak = fma_gflops(torch.get_num_threads())
        if peak is not None:
            found["fma_gflops"] = peak
    return found


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_gbytes_per_s(device: str, repeats: int) -> float:
    """Bytes read and written a second by a copy of 128 MiB (GPU: 1 GiB), median of a few."""
    source = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    time_call = timer(device)
    return 2e-9 * source.nbytes / statistics.median(time_call(lambda: target.copy_(source)) for _ in range(repeats))


def fma_gflops(number: int) -> float | None:
    """float32 GFLOP/s of multiply-adds on registers alone, on so many threads; None without a compiler."""
    program = _fma_program()
    if program is None:
        return None
    done = subprocess.run([program, str(number)], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


@functools.cache
def _fma_program() -> str | None:
    folder = tempfile.TemporaryDirectory()
    program = Path(folder.name) / "fma_peak"
    compiler = os.environ.get("CXX", "g++")
    source = ROOT / "benchmarks" / "fma_peak.cc"
    try:
        subprocess.run([compiler, "-O2", "-march=native", "-pthread", source, "-o", program], check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    atexit.register(folder.cleanup)
    return str(program)


def peak_extra_mib(call: Callable[[], Any], device: str) -> float | None:
    """MiB that a warm call adds at its peak, results included; None where it cannot be measured.

    GPU: torch's allocator, `max_memory_allocated`. CPU: resident memory of the whole process, so that scratch outside
    torch's allocator counts too: the high-water mark, reset just before the call, less what was resident then.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_mib = torch.cuda.memory_allocated() / 2**20
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20 - before_mib
    try:
        # Pages that malloc keeps would be used again and not counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before_mib = _resident_mib("VmRSS")
        call()
        return max(0.0, _resident_mib("VmHWM") - before_mib)
    except (OSError, AttributeError):
        return None


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024
