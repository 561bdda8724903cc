"""`python -m benchmarks.tune`: the launch options of the Triton attention kernels that are fastest on this GPU.

    python -m benchmarks.tune --dtypes bfloat16 --head-dims 64,80        on a machine with an NVIDIA GPU
    python -m benchmarks.tune --dry-run --out /tmp/launch.json           the same flow on the CPU, tiny, interpreted

For each dtype, head_dim and kernel of `triton_gpu_launch.KERNELS`, candidates are compiled in parallel processes.
Those that do not compile, exceed shared memory, spill in 16 bits or miss the error budget are left out and counted. The
others are timed at the pretraining length, interleaved, and the best of them at every length class; the score is the
geometric mean over the classes of the time over the rule's. A winner by 2 % or more becomes a row of
`triton_gpu_launch.json`, beside those of other GPUs; else the rule stays and there is no row. Rows are written as soon
as they are known.

Length classes have no rows of their own: a sequence's numbers depend on the tiles' sides, and must not depend on what
else is in its batch (docs/contract.md §2). The table's gradient reads the table expanded where its sides and warps are
those of dq, and gathered elsewhere; so dq is tuned first and "pairs" beside the choice: tune the two together.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_compile
from benchmarks.contest import Contest, Contestant, wall_clock
from simvlm.kernels import PrefixLayout, parity, triton_device
from simvlm.kernels.attention import spec, triton_gpu, triton_gpu_launch

FILE = Path(triton_gpu_launch.__file__).with_name(triton_gpu_launch.FILE)
LEAST_GAIN = 0.02
FINALISTS = 6
"""Candidates that are timed at every length class, beside the rule."""
FUNCTIONS = {
    "forward": ("forward_kernel", "split_kernel"),
    "dq": ("dq_kernel",),
    "dk_dv": ("dk_dv_kernel",),
    "pairs": ("table_pairs_kernel",),
}
"""What a kernel's options reach."""
WANTED = {
    "dq": (True, False, False, False),
    "dk_dv": (False, True, True, False),
    "pairs": (False, False, False, True),
}
"""The gradients that make backward launch this kernel and not the others."""

Options = dict[str, int]
Rows = dict[triton_gpu_launch.Key, Options]


def cases(head_dim: int, dry: bool) -> list[spec.Case]:
    """The length classes, pretraining first."""
    if dry:
        return [spec.Case(name="dry", q_lens=(40,), prefix_lens=20, image_grid=(3, 4), heads=1, head_dim=head_dim)]
    case = functools.partial(spec.Case, heads=12, head_dim=head_dim)
    captions = tuple(4 + 11 * b % 29 for b in range(512))
    prefixes = tuple(196 + 101 * b % 256 for b in range(128))
    return [
        case(name="pretrain", q_lens=(452,) * 128, prefix_lens=prefixes, image_grid=(14, 14), padded=(452, 452)),
        case(name="px480", q_lens=(964,) * 32, prefix_lens=930, image_grid=(30, 30), padded=(964, 964)),
        case(name="long", q_lens=(4160,) * 2, prefix_lens=4128, image_grid=(64, 64), padded=(4160, 4160)),
        case(name="captions", q_lens=captions, prefix_lens=0, tail=0),
    ]


def budget_case(head_dim: int, dry: bool) -> spec.Case:
    """What a candidate must get right first: the grid of pretraining, so that it is compiled once for both."""
    if dry:
        return cases(head_dim, dry)[0]
    lens = {"q_lens": (230, 60), "prefix_lens": (205, 10), "padded": (230, 230)}
    return spec.Case(name="budget", image_grid=(14, 14), has_image=(True, False), head_dim=head_dim, **lens)  # type: ignore[arg-type]


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, capability: int) -> list[Options]:
    """The rule first."""
    # Float32 products are three each, with operands twice as wide.
    sides = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    found = [triton_gpu_launch.rule(kernel, head_dim, dtype, capability)]
    for numbers in itertools.product(sides, sides, (4, 8), (1, 2, 3, 4)):
        options = dict(zip(triton_gpu_launch.OPTIONS, numbers, strict=True))
        # The scores of 128 × 128 alone would take half of the registers of four warps.
        too_large = options["BLOCK_T"] * options["BLOCK_S"] > 64 * 128 and options["num_warps"] == 4
        if options not in found and not too_large:
            found.append(options)
    return found


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A case's arguments on a device."""

    layout: PrefixLayout
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    table: Tensor | None
    scale: float

    @classmethod
    def of(cls, case: spec.Case, dtype: torch.dtype, device: str, make: Any = torch.randn) -> Tensors:
        q_shape, k_shape = case.shapes()
        size = (case.heads, case.head_dim)
        q, k, v, dout = (make(*shape, *size, device=device).to(dtype) for shape in (q_shape, k_shape, k_shape, q_shape))
        table = None
        if case.has_table and case.image_grid is not None:
            table = make(case.heads, *(2 * side - 1 for side in case.image_grid), device=device)
        dlse = make(*q_shape, case.heads, device=device)
        return cls(case.layout().to(device), q, k, v, dout, dlse, table, case.softmax_scale)

    def forward(self) -> tuple[Tensor, Tensor]:
        return triton_gpu.forward(self.q, self.k, self.v, self.layout, self.table, self.scale)

    def run(self, kernel: str, out: Tensor, lse: Tensor) -> Any:
        """The call of the launchers that runs this kernel, and of the others as few as can be."""
        if kernel == "forward":
            return self.forward()
        return triton_gpu.backward(
            self.dout, self.dlse, self.q, self.k, self.v, out, lse, self.layout, self.table, self.scale, WANTED[kernel]
        )


def resources(
    target: str, case: spec.Case, dtype: torch.dtype, kernel: str, rows: Rows, shared_bytes: int
) -> str | None:
    """Why a kernel cannot be launched with the options in `rows`, or None. Runs in a process of its own."""
    torch.set_num_threads(1)
    tensors = Tensors.of(case, dtype, "cpu", lambda *shape, device: torch.empty(shape, dtype=torch.float32))
    with mock.patch.object(triton_gpu_launch, "measured", return_value=rows):
        launches = gpu_compile.recorded(target, lambda: tensors.run(kernel, *tensors.forward()))
    for launch in launches.values():
        if launch.kernel.__name__ in FUNCTIONS[kernel]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of the PTX that ptxas refused
                    found = gpu_compile.compiled(target, launch)
            except Exception as error:  # whatever a compiler raises
                return f"does not compile ({type(error).__name__})"
            if found["shared_bytes"] > shared_bytes:
                return "exceeds shared memory"
            if found["spilled_bytes"] and dtype != torch.float32:
                return "spills"
    return None


@dataclasses.dataclass
class Tuner:
    """One GPU, or the interpreter.

    Attributes:
        rows: what the launchers are to take at this moment.
        left_out: reason → number of candidates.
    """

    dry: bool
    capability: int
    rows: Rows
    shared_bytes: int
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def best(self, kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[Options, float]:
        """The fastest options and their gain over the rule; (the rule, 0.0) where they gain too little."""
        self.left_out.clear()
        name = str(dtype).removeprefix("torch.")
        classes = [case for case in cases(head_dim, self.dry) if kernel != "pairs" or case.has_table]
        key = (self.capability, name, head_dim, kernel)
        tried = candidates(kernel, head_dim, dtype, self.capability)[: 2 if self.dry else None]
        tried = self._compiled(tried, classes[:1], key, dtype)
        tried = [options for place, options in enumerate(tried) if self._is_right(options, key) or place == 0]
        scores = self._scores(tried, classes[:1], key, dtype, rounds=1 if self.dry else 7)
        tried = [tried[place] for place in sorted(scores, key=lambda place: (place > 0, scores[place]))]
        tried = self._compiled(tried[: 1 + FINALISTS], classes[1:], key, dtype)
        scores = self._scores(tried, classes, key, dtype, rounds=1 if self.dry else 25)
        winner = min(scores, key=lambda place: scores[place])
        gain = 1 / scores[winner] - 1
        if winner == 0 or gain < LEAST_GAIN:
            self.rows.pop(key, None)
            return tried[0], 0.0
        self.rows[key] = tried[winner]
        return tried[winner], gain

    def _compiled(
        self, tried: list[Options], classes: list[spec.Case], key: triton_gpu_launch.Key, dtype: torch.dtype
    ) -> list[Options]:
        """Those that can be launched at these classes; and Triton's cache on disk then has them. The rule stays."""
        target = "sm_90" if self.dry else f"sm_{self.capability}"
        jobs = [(options, case) for options in tried for case in classes]
        with _outside_interpreter(), _pool(1 if self.dry else os.cpu_count() or 1) as pool:
            waiting = [
                pool.submit(
                    resources,
                    target,
                    case,
                    dtype,
                    key[3],
                    _for_target(self.rows | {key: options}, target),
                    self.shared_bytes,
                )
                for options, case in jobs
            ]
            told = [future.result() for future in waiting]
        wrong = {id(options): reason for (options, _), reason in zip(jobs, told, strict=True) if reason}
        wrong.pop(id(tried[0]), None)
        self.left_out.update(wrong.values())
        return [options for options in tried if id(options) not in wrong]

    def _is_right(self, options: Options, key: triton_gpu_launch.Key) -> bool:
        with mock.patch.object(triton_gpu_launch, "measured", return_value=self.rows | {key: options}):
            try:
                missed = parity.violations(spec, budget_case(key[2], self.dry), "torch", "triton", key[1])
            except Exception as error:  # out of resources at launch
                self.left_out[f"does not run ({type(error).__name__})"] += 1
                return False
        self.left_out["misses the error budget"] += bool(missed)
        return not missed

    def _scores(
        self,
        tried: list[Options],
        classes: list[spec.Case],
        key: triton_gpu_launch.Key,
        dtype: torch.dtype,
        rounds: int,
    ) -> dict[int, float]:
        """place in `tried` → geometric mean over the classes of its median time over the rule's, the first's."""
        logs: dict[int, list[float]] = {place: [] for place in range(len(tried))}
        for case in classes:
            tensors, rows = Tensors.of(case, dtype, self.device), dict(self.rows)
            with mock.patch.object(triton_gpu_launch, "measured", return_value=rows):
                rows[key] = tried[0]
                out, lse = tensors.forward()

                def call(options: Options, tensors: Any = tensors, rows: Any = rows, saved: Any = (out, lse)) -> Any:
                    rows[key] = options
                    return tensors.run(key[3], *saved)

                players = [
                    Contestant(name=str(place), what=str(options), kind="ours", call=functools.partial(call, options))
                    for place, options in enumerate(tried)
                ]
                contest = Contest(players, "0", timer=wall_clock if self.dry else device_time)
                contest.warm_up()
                for _ in range(rounds):
                    contest.round()
            for name, timing in contest.timings().items():
                logs[int(name)].append(math.log(timing.ratio))
            for error in contest.failures.values():
                self.left_out[f"does not run ({type(error).__name__})"] += 1
        return {place: math.exp(sum(x) / len(x)) for place, x in logs.items() if len(x) == len(classes)}


@functools.cache
def _larger_than_l2() -> Tensor:
    return torch.empty(2**30, dtype=torch.int8, device="cuda")


def device_time(call: Any) -> float:
    """Seconds of the device alone, L2 cold: what clears it runs while the host launches, which all do alike."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _larger_than_l2().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _for_target(rows: Rows, target: str) -> Rows:
    """The rows as `gpu_compile.recorded` finds them: a dry run's, of capability 0, are compiled for some GPU."""
    capability = int(target.removeprefix("sm_"))
    return rows | {(capability, *key[1:]): options for key, options in rows.items() if key[0] == 0}


@contextlib.contextmanager
def _outside_interpreter() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn)


def merged(rows: list[dict[str, Any]], key: triton_gpu_launch.Key, row: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The file's rows with this one in the place of its key's, or without any where it is None; sorted."""
    kept = [other for other in rows if _key(other) != key] + ([] if row is None else [row])
    return sorted(kept, key=_key)


def _key(row: dict[str, Any]) -> triton_gpu_launch.Key:
    return row["capability"], row["dtype"], row["head_dim"], row["kernel"]


def written(rows: list[dict[str, Any]]) -> str:
    """One row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n" if rows else "[]\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", default="bfloat16", help="with commas (default: bfloat16)")
    parser.add_argument("--head-dims", default="64,80", help="with commas (default: 64,80)")
    parser.add_argument("--kernels", default=",".join(triton_gpu_launch.KERNELS), help="with commas (default: all)")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of rows (default: the package's)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, in Triton's interpreter; needs --out")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels.split(",")) - set(triton_gpu_launch.KERNELS):
        parser.error(f"--kernels must be of {', '.join(triton_gpu_launch.KERNELS)}, got {', '.join(sorted(unknown))}")
    if unknown := set(options.dtypes.split(",")) - set(gpu_compile.DTYPES):
        parser.error(f"--dtypes must be of {', '.join(gpu_compile.DTYPES)}, got {', '.join(sorted(unknown))}")
    if options.dry_run and options.out == FILE:
        parser.error("--dry-run measures nothing: give it an --out of its own")
    if not options.dry_run and (not torch.cuda.is_available() or torch.version.hip is not None):
        parser.error("there is no NVIDIA GPU here (--dry-run tries the flow without one)")
    if options.dry_run != triton_device.interpreted():
        # Triton looks when it is imported, and torch has done that.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_INTERPRET": "1"} if options.dry_run else {}
        given = sys.argv[1:] if arguments is None else arguments
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.tune", *given], environment)

    capability, shared_bytes, device = 0, gpu_compile.SHARED_BYTES["sm_90"], "interpreter"
    if not options.dry_run:
        major, minor = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(0)
        capability, device = 10 * major + minor, properties.name
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    known = {_key(row): {name: row[name] for name in triton_gpu_launch.OPTIONS} for row in rows}
    tuner = Tuner(options.dry_run, capability, known, shared_bytes)
    head = {"device": device, "triton": importlib.metadata.version("triton")}
    for dtype, head_dim in itertools.product(options.dtypes.split(","), map(int, options.head_dims.split(","))):
        for kernel in [kernel for kernel in triton_gpu_launch.KERNELS if kernel in options.kernels.split(",")]:
            found, gain = tuner.best(kernel, head_dim, parity.DTYPES[dtype])
            key = (capability, dtype, head_dim, kernel)
            row: dict[str, Any] = dict(zip(("capability", "dtype", "head_dim", "kernel"), key, strict=True))
            rows = merged(rows, key, row | found | {"gain": round(gain, 3)} | head if gain else None)
            options.out.write_text(written(rows))
            shown = ", ".join(f"{name} {number}" for name, number in found.items())
            left_out = "; ".join(f"{count} {reason}" for reason, count in tuner.left_out.items() if count)
            print(f"{dtype} {head_dim} {kernel}: {shown}, gain {gain:.1%}; left out: {left_out or 'none'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
