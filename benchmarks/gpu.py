"""`python -m benchmarks.gpu --out DIR`: everything that this package asks of a GPU, in one command of some minutes.

    python -m benchmarks.gpu --out results-h200          on a machine with an NVIDIA GPU; needs no network
    python -m benchmarks.gpu --out /tmp/dry --dry-run    the same flow on the CPU, tiny, Triton in its interpreter

In order, each written to DIR as soon as it is known, so that a run that is cut still reports: parity of every Triton
kernel in float32, bfloat16 and float16; 30 bit-equal repeats; the first call in a fresh process with an empty cache;
attention against its rivals at sizes that fill a GPU, forward and with gradients; the stem's ops; the demo's step.
DIR/gpu.json holds all of it, DIR/<op>.json, .md and .png the contests of each op.

Exit status 1 where a kernel misses its error budget, a repeat differs, or a stage fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_attention, bench_batch_norm, bench_demo_step, bench_embed, machine, render
from benchmarks.contest import Stopwatch
from benchmarks.record import Settings, one_line
from simvlm.kernels import parity, triton_device
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.stem import batch_norm_spec, embed_spec

SPECS = {"prefix_attention": attention_spec, "batch_norm_act": batch_norm_spec, "embed_sequence": embed_spec}
CONTESTS = {
    "prefix_attention": (bench_attention.bench_prefix_attention, bench_attention.selection),
    "batch_norm_act": (bench_batch_norm.bench_batch_norm_act, bench_batch_norm.selection),
    "embed_sequence": (bench_embed.bench_embed_sequence, bench_embed.selection),
    "demo_step": (bench_demo_step.bench_demo_step, bench_demo_step.selection),
}
DRY_CASES = {
    "prefix_attention": "beams",
    "batch_norm_act": "residual",
    "embed_sequence": "mixed",
    "demo_step": bench_demo_step.CASE,
}
REPEATS = 30


class Measured:
    """What a `bench_…` function takes for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Callable[[], None], *, rounds: int, iterations: int) -> None:
        for _ in range(rounds * iterations):
            function()


@dataclasses.dataclass
class Run:
    """One run: where it writes, when it must end, and what it knows so far; `dry` without a GPU, tiny."""

    out: Path
    dry: bool
    ends: float
    report: dict[str, Any]

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "gpu.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n")
        aside.replace(path)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()


# ---- parity ----------------------------------------------------------------------------------------------------------


def check_parity(run: Run) -> None:
    """Every core case of every op; in processes, because what takes long is to compile some hundred kernels."""
    dtypes = ("float32", "float16") if run.dry else ("float32", "bfloat16", "float16")
    jobs = [
        (op, case.name, dtypes)
        for op, spec in SPECS.items()
        for case in [case for case in spec.CASES if case.tier == "core"][: 2 if run.dry else None]
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1 if run.dry else os.cpu_count(), mp_context=context) as pool:
        red = [line for found in pool.map(misses, *zip(*jobs, strict=True)) for line in found]
    run.report["parity"] = {"cases": len(jobs), "dtypes": dtypes, "red": red}
    if red:
        raise AssertionError(f"{len(red)} misses of the error budget, the first: {red[0]}")


def misses(op: str, name: str, dtypes: tuple[str, ...]) -> list[str]:
    """Where Triton misses the budget on one case."""
    torch.set_num_threads(1)
    spec = SPECS[op]
    case = next(case for case in spec.CASES if case.name == name)
    found = []
    for dtype in dtypes:
        try:
            red = [str(violation) for violation in parity.violations(spec, case, "torch", "triton", dtype)]
        except Exception as error:  # a kernel that fails is a row too
            red = [one_line(error)]
        found += [f"{op} {name} {dtype}: {line}" for line in red]
    return found


def check_repeats(run: Run) -> None:
    """Forward and backward of one case, again and again: the same bits."""
    name, repeats = ("decode_chunk_table", 2) if run.dry else ("gpu_pretrain", REPEATS)
    different = []
    for dtype in ("float32",) if run.dry else ("float32", "bfloat16", "float16"):
        call = _call(name, dtype, run.device)
        first = call()
        for _ in range(repeats - 1):
            if not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)):
                different.append(dtype)
                break
    run.report["repeats"] = {"case": name, "repeats": repeats, "different": different}
    if different:
        raise AssertionError(f"repeats differ in {', '.join(different)}")


def _call(name: str, dtype: str, device: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    problem = bench_attention.Problem(bench_attention.named(name), dtype, device)
    call: Callable[[], tuple[torch.Tensor, ...]] = bench_attention.contestant(
        problem, "both", bench_attention.public("triton"), "ours"
    ).call
    return call


# ---- time ------------------------------------------------------------------------------------------------------------

_COLD = """
import sys, time
started = time.perf_counter()
from benchmarks import gpu
call = gpu._call({name!r}, {dtype!r}, {device!r})
ready = time.perf_counter()
call()
if {device!r} == "cuda":
    import torch
    torch.cuda.synchronize()
print(ready - started, time.perf_counter() - ready)
"""


def time_cold_start(run: Run) -> None:
    """Seconds of the first call, forward and backward, in a fresh process whose Triton cache is empty."""
    name, dtype = ("decode_chunk_table", "float32") if run.dry else ("gpu_pretrain", "bfloat16")
    with tempfile.TemporaryDirectory() as cache:
        program = _COLD.format(name=name, dtype=dtype, device=run.device)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=machine.ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    preparation, first_call = map(float, done.stdout.split()[-2:])
    run.report["cold_start"] = {"case": name, "dtype": dtype, "preparation_s": preparation, "first_call_s": first_call}


def chosen(run: Run, op: str) -> list[tuple[str, str, str]]:
    """(case, dtype, direction) of an op's contests, the most telling first."""
    _, selection = CONTESTS[op]
    if run.dry:
        return selection([DRY_CASES[op]], ["float32"], True)
    names = [case.name for case in attention_spec.GPU_BENCHMARKS] if op == "prefix_attention" else []
    return selection(names, ["bfloat16"], False)


def time_op(run: Run, op: str) -> None:
    """One op's contests, its pages written anew after each; what no time was left for is named."""
    bench, _ = CONTESTS[op]
    settings = Settings.of(run.device, quick=run.dry)
    settings = dataclasses.replace(settings, budget_s=0.1 if run.dry else 1.5)
    found: list[dict[str, Any]] = []
    skipped, failed = [], []
    for case, dtype, direction in chosen(run, op):
        name = f"{case} {dtype} {direction}"
        if run.left_s < 0:
            skipped.append(name)
            continue
        measured = Measured()
        try:
            bench(Stopwatch(), measured, settings, case, dtype, direction)
        except BaseException as error:  # pytest.fail is no Exception; the contest's rows are kept where it has them
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(f"{name}: {one_line(Exception(str(error)))}")
        finally:
            if run.device == "cuda":
                torch.cuda.empty_cache()
        if measured.extra_info:
            found.append({"extra_info": measured.extra_info})
            render.write(run.report["head"] | {"benchmarks": found}, run.out, op)
        run.report[op] = {"contests": len(found), "skipped": skipped, "failed": failed}
        run.save()
    if skipped or failed:
        raise RuntimeError(f"{len(failed)} contests failed, no time for {len(skipped)}: {[*failed, *skipped][0]}")


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
    command = f"python -m benchmarks.gpu{' --dry-run' if options.dry_run else ''}"
    head = {
        "machine_info": machine.facts("cpu" if options.dry_run else "cuda"),
        "commit_info": machine.commit(),
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.dry_run,
        "command": command,
    }
    run = Run(options.out, options.dry_run, time.monotonic() + options.seconds, {"head": head, "stages": []})
    stages: dict[str, Callable[[Run], None]] = {
        "parity": check_parity,
        "repeats": check_repeats,
        "cold start": time_cold_start,
        **{op: lambda run, op=op: time_op(run, op) for op in CONTESTS},  # type: ignore[misc]
    }
    for name, stage in stages.items():
        started = time.monotonic()
        try:
            stage(run)
            reason = None
        except Exception as error:  # one stage's failure must not cost the others
            reason = one_line(error)
        run.report["stages"].append({"stage": name, "seconds": time.monotonic() - started, "failed": reason})
        run.save()
        print(f"{name}: {reason or 'done'} ({time.monotonic() - started:.0f} s)", flush=True)
    return int(any(stage["failed"] for stage in run.report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
