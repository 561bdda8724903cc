"""`python -m benchmarks.gpu --out DIR`: everything that this package asks of a GPU, in one command of some minutes.

    python -m benchmarks.gpu --out results-h200          on a machine with an NVIDIA GPU; needs no network
    python -m benchmarks.gpu --out /tmp/dry --dry-run    the same flow on the CPU, tiny, Triton in its interpreter

What matters most comes first, and is written to DIR as soon as it is known, so that a run that is cut still reports:
parity of every Triton kernel in float32, bfloat16 and float16; 30 bit-equal repeats; tests/test_gpu.py; the first call
in a fresh process with an empty cache; attention against its rivals at the pretraining shape; peak memory by length; a
training step of Base; attention at other shapes; the stem's ops; the demo's step. DIR/README.md sums it up and says
which goals are met, DIR/gpu.json holds all of it, DIR/<op>.json, .md and .png the contests of each op.

It needs torch, Triton, numpy, pytest, pytest-benchmark, matplotlib and rich; a stage that needs more is left out. Exit
status 1 where a kernel misses its error budget, a repeat differs, or a stage fails; a missed goal is no failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import attention_cases, gpu_checks, gpu_summary, machine, render, stem_cases
from benchmarks.contest import Stopwatch
from benchmarks.gpu_run import PROCESSES, NeedsError, Run, in_processes
from benchmarks.record import Settings, one_line
from simvlm.kernels import triton_device

Contest = tuple[str, str, str]
"""Case, dtype, direction."""

MODULES = {
    "prefix_attention": "bench_attention",
    "base_step": "base_step",
    "batch_norm_act": "bench_batch_norm",
    "embed_sequence": "bench_embed",
    "demo_step": "bench_demo_step",
}
"""op → where its contests are."""
CASES = {
    "prefix_attention": [case.name for case in attention_cases.GPU_BENCHMARKS],
    "base_step": ["base"],
    "batch_norm_act": [case.name for case in stem_cases.BATCH_NORM_GPU],
    "embed_sequence": [case.name for case in stem_cases.EMBED_GPU],
    "demo_step": ["demo"],
}
COMPILE_S = 100
"""The most seconds that compiling ahead may take."""
DRY_CASES = {
    "prefix_attention": ["grid_row", "beams"],
    "base_step": ["demo"],
    "batch_norm_act": ["residual"],
    "embed_sequence": ["mixed"],
    "demo_step": ["demo"],
}


class Measured:
    """What a `bench_…` function takes for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], None], *, rounds: int, iterations: int) -> None:
        for _ in range(rounds * iterations):
            function()


def module_of(op: str) -> ModuleType:
    try:
        return importlib.import_module(f"benchmarks.{MODULES[op]}")
    except ModuleNotFoundError as error:
        raise NeedsError(error.name) from None


def contests(dry: bool, op: str) -> list[Contest]:
    """An op's, the most telling first: bfloat16; of attention at the pretraining shape the other dtypes last."""
    selection = module_of(op).selection
    if dry:
        found = selection(DRY_CASES[op], ["float32"], True)
        return found if op == "prefix_attention" else found[-1:]
    found = selection(CASES[op], ["bfloat16"], False)
    if op == "prefix_attention":
        found += selection(CASES[op][:1], ["float16", "float32"], False)
    return found


def compile_ahead(run: Run) -> None:
    """Compiles the rivals that torch.compile builds, all at once: their contests find them in torch's cache on disk.

    One after the other they would take most of the run's time. What fails here fails again in its contest, and is told
    there.
    """
    jobs = []
    for op in MODULES:
        if op != "demo_step":
            jobs += [(op, *contest, run.device) for contest in contests(run.dry, op)]
    if run.dry:
        jobs = [job for job in jobs if job[0] == "batch_norm_act"][:1]
    found, missing = in_processes(compiled, jobs, 1 if run.dry else PROCESSES, COMPILE_S)
    failed = [line for line in found if line]
    run.report["compile"] = {"contests": len(jobs), "not_done": missing, "failed": failed}


def compiled(job: tuple[str, str, str, str, str]) -> str | None:
    """Compiles the rivals of one contest (op, case, dtype, direction, device); returns why that failed, or None."""
    import torch._inductor.config as inductor

    op, case, dtype, direction, device = job
    torch.set_num_threads(1)
    inductor.compile_threads = 1  # else each of these processes starts a pool of its own
    torch.compiler.reset()
    try:
        module_of(op).compile_ahead(case, dtype, direction, device)
    except Exception as error:
        return f"{op} {case} {dtype} {direction}: {one_line(error)}"
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return None


def time_contests(run: Run, op: str, pretraining: bool | None = None) -> None:
    """One op's contests, its page written anew after each; what no time was left for is named.

    Args:
        pretraining: only those of the first case in the first dtype, or only the others; None: all.
    """
    module, chosen = module_of(op), contests(run.dry, op)
    if pretraining is not None:
        chosen = [contest for contest in chosen if (contest[:2] == chosen[0][:2]) == pretraining]
    settings = Settings.of(run.device, quick=run.dry)
    settings = dataclasses.replace(settings, budget_s=1.5)
    if run.dry:
        settings = dataclasses.replace(settings, budget_s=0, min_rounds=1)
    pages = run.contests.setdefault(op, [])
    told = run.report.setdefault("contests", {}).setdefault(op, {"timed": 0, "skipped": [], "failed": []})
    failed_before, skipped_before = len(told["failed"]), len(told["skipped"])
    for case, dtype, direction in chosen:
        name = f"{case} {dtype} {direction}"
        if run.left_s < 0 or run.lost:
            told["skipped"].append(name)
            continue
        measured, started = Measured(), time.monotonic()
        try:
            getattr(module, f"bench_{op}")(Stopwatch(), measured, settings, case, dtype, direction)
        except ModuleNotFoundError as error:
            raise NeedsError(error.name) from None
        except BaseException as error:  # pytest.fail is no Exception; the contest's rows are kept where it has them
            if isinstance(error, KeyboardInterrupt):
                raise
            told["failed"].append(f"{name}: {one_line(Exception(str(error)))}")
        finally:
            run.free()
        if measured.extra_info:
            pages.append({"extra_info": measured.extra_info})
            told["timed"] = len(pages)
            render.write_pages(run.report["head"] | {"benchmarks": pages}, run.out, op)
        run.save()
        print(f"  {op} {name} ({time.monotonic() - started:.0f} s)", flush=True)
    if pages:
        render.draw(run.report["head"] | {"benchmarks": pages}, run.out, op)
    failed, skipped = told["failed"][failed_before:], told["skipped"][skipped_before:]
    if failed:
        raise RuntimeError(f"{len(failed)} contests failed, one of them: {failed[0]}")
    if skipped:
        raise NeedsError(f"more time, for {len(skipped)} contests: {', '.join(skipped)}")


STAGES: dict[str, Callable[[Run], None]] = {
    "parity": gpu_checks.check_parity,
    "repeats": gpu_checks.check_repeats,
    "tests": gpu_checks.run_tests,
    "cold start": gpu_checks.time_cold_start,
    "compile": compile_ahead,
    "prefix_attention, pretraining": functools.partial(time_contests, op="prefix_attention", pretraining=True),
    "memory": gpu_checks.measure_memory,
    "base_step": functools.partial(time_contests, op="base_step"),
    "prefix_attention": functools.partial(time_contests, op="prefix_attention", pretraining=False),
    "batch_norm_act": functools.partial(time_contests, op="batch_norm_act"),
    "embed_sequence": functools.partial(time_contests, op="embed_sequence"),
    "demo_step": functools.partial(time_contests, op="demo_step"),
}


ALONE = ("parity", "tests", "cold start", "compile")
"""Stages that work in processes of their own."""


def run_stage(run: Run, name: str) -> None:
    """Runs it, and writes what became of it."""
    started = time.monotonic()
    failed = left_out = None
    try:
        if run.lost and name not in ALONE:
            raise RuntimeError("a fault in an earlier stage has made the GPU useless to this process")
        STAGES[name](run)
    except NeedsError as error:
        left_out = f"left out: needs {error}"
    except Exception as error:  # one stage's failure must not cost the others
        failed = one_line(error)
    stage = {"stage": name, "seconds": time.monotonic() - started, "failed": failed, "left_out": left_out}
    run.report["stages"].append(stage)
    run.save()
    run.free()
    (run.out / "README.md").write_text(gpu_summary.page(run))
    print(f"{name}: {gpu_summary.verdict(stage)} ({stage['seconds']:.0f} s)", flush=True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=450, help="start no contest after so many (default: 450)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here (--dry-run tries the flow without one)")

    if options.dry_run != triton_device.interpreted():
        # Triton looks when it is imported, and torch has done that.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_INTERPRET": "1"} if options.dry_run else {}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]], environment)
    head = {
        "machine_info": machine.facts("cpu" if options.dry_run else "cuda"),
        "commit_info": machine.commit(),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.dry_run,
        "command": f"python -m benchmarks.gpu{' --dry-run' if options.dry_run else ''}",
    }
    run = Run(options.out, options.dry_run, time.monotonic() + options.seconds, {"head": head, "stages": []})
    for name in STAGES:
        run_stage(run, name)
    print(gpu_summary.short(run), flush=True)
    return int(any(stage["failed"] for stage in run.report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
