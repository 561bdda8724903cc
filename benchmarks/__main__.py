"""`python -m benchmarks`: runs the suite through pytest-benchmark, then writes and prints what it found.

    python -m benchmarks                               everything that has a benchmark
    python -m benchmarks --op prefix_attention         one op
    python -m benchmarks --op prefix_attention --cases pretrain,decode --dtypes bfloat16
    python -m benchmarks --quick                       a look, not a result: under two minutes

A full run of an op writes <out>/<device>/<op>.json, .md and .png with out = benchmarks/results; a partial one (--quick,
--cases, --dtypes) writes under runs/benchmarks unless --out says otherwise, so that it cannot replace a full result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.machine import ROOT

RESULTS = Path("benchmarks/results")
PARTIAL = Path("runs/benchmarks")


def main(arguments: list[str] | None = None) -> int:
    """Returns pytest's exit status: not 0 where a kernel missed its error budget."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", help="only this op, e.g. prefix_attention")
    parser.add_argument("--cases", help="only these cases of --op, with commas; cases of the tests work too")
    parser.add_argument("--dtypes", help="only these dtypes, with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds, nothing built by torch.compile")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {RESULTS}, {PARTIAL} if partial)")
    options = parser.parse_args(given)

    partial = options.quick or options.cases or options.dtypes
    out = options.out or ROOT / (PARTIAL if partial else RESULTS)
    passed_on = [
        f"--{name}={value}" for name in ("op", "cases", "dtypes", "device") if (value := getattr(options, name))
    ]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        status = pytest.main(
            [
                str(ROOT / "benchmarks"),
                "--benchmark-only",
                "--benchmark-quiet",
                f"--benchmark-json={raw}",
                *passed_on,
                *(["--quick"] if options.quick else []),
            ]
        )
        if not raw.exists() or not raw.stat().st_size:
            print("benchmarks: nothing was measured", file=sys.stderr)
            return int(status) or 1
        report: dict[str, Any] = json.loads(raw.read_text())
    # --out is where the reader happened to want it, and no part of what was measured.
    command = ["python", "-m", "benchmarks", *(["--quick"] if options.quick else []), *passed_on]
    report["command"] = shlex.join(command)
    for op in dict.fromkeys(benchmark["extra_info"]["op"] for benchmark in report["benchmarks"]):
        own = [benchmark for benchmark in report["benchmarks"] if benchmark["extra_info"]["op"] == op]
        render.write(report | {"benchmarks": own}, out / report["machine_info"]["slug"], op)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
