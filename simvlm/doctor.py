"""What runs on this machine: versions, CPU levels, every op's implementations and every metric, or why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import simvlm
from simvlm.kernels import OPS, implementations

_PACKAGES = ("numpy", "torch", "triton", "jax", "jaxlib")


def report() -> str:
    """The report as text, one fact a line."""
    lines = [f"simvlm {simvlm.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(f"CPU: {cpu_model()}, {len(os.sched_getaffinity(0))} usable cores")
    lines.append("packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    lines.append(_cpu_levels())
    for op in OPS:
        lines += ["", op]
        for status in implementations(op):
            lines.append(f"  {status.family:6} {status.name:10} {status.reason or 'available'}")
    return "\n".join([*lines, "", *_caption_metrics()])


def _caption_metrics() -> list[str]:
    from simvlm.tasks.caption_metrics import METRICS, unavailable_metrics
    from simvlm.tasks.java_scorers import java_version

    packages = ", ".join(f"{name} {_version(name)}" for name in ("sacrebleu", "pycocoevalcap"))
    lines = ["caption metrics", f"  {'Java':10} {java_version() or 'not found'}", f"  {'packages':10} {packages}"]
    reasons = unavailable_metrics()
    for metric in METRICS:
        lines.append(f"  {metric:10} {f'skipped: {reasons[metric]}' if metric in reasons else 'available'}")
    return lines


def variants() -> str:
    """Exact parameter counts of every variant, with their breakdown (docs/model.md)."""
    from simvlm.model import VARIANTS
    from simvlm.model.config import parameter_counts

    counts = {name: parameter_counts(config) for name, config in VARIANTS.items()}
    parts = list(next(iter(counts.values())))
    lines = [f"{'parameters':12}" + "".join(f"{name:>16}" for name in counts)]
    for part in parts:
        lines.append(f"{part:12}" + "".join(f"{count[part]:>16,}" for count in counts.values()))
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_levels() -> str:
    from simvlm.kernels.attention import cpp_cpu

    reason = cpp_cpu.unavailable()
    if reason is not None:
        return f"C++ kernels: {reason}"
    from simvlm import _cpp

    levels = ", ".join(name if runs else f"{name} (not on this CPU)" for name, runs in _cpp.levels())
    return f"C++ kernels: {_cpp.level()} in use; compiled: {levels}"
