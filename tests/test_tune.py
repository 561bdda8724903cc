"""`python -m benchmarks.tune` without a GPU, and the file of launch options that it writes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import tune
from simvlm.kernels.attention import triton_gpu_launch

ROOT = pathlib.Path(__file__).parent.parent
ROW = {"capability": 90, "dtype": "bfloat16", "head_dim": 64, "kernel": "dq"}


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_dry_run_goes_all_the_way(tmp_path):
    """Compiled, checked, timed, written beside another GPU's row."""
    path = tmp_path / "launch.json"
    other = ROW | triton_gpu_launch.rule("dq", 64, torch.bfloat16, 90) | {"gain": 0.1, "device": "x", "triton": "3.7.1"}
    path.write_text(tune.written([other]))
    done = _run("--dry-run", f"--out={path}", "--dtypes=float16", "--head-dims=16", "--kernels=forward,pairs")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["float16 16 forward", "float16 16 pairs"]
    rows = json.loads(path.read_text())
    assert other in rows
    assert {row["capability"] for row in rows} <= {0, 90}
    _legal(rows)


def test_it_refuses_without_a_gpu_and_a_dry_run_into_the_package():
    if not torch.cuda.is_available():
        done = _run()
        assert (done.returncode, "there is no NVIDIA GPU here" in done.stderr) == (2, True)
    done = _run("--dry-run")
    assert (done.returncode, "give it an --out of its own" in done.stderr) == (2, True)


def _legal(rows: list[dict]) -> None:
    assert len({tune._key(row) for row in rows}) == len(rows)
    for row in rows:
        assert row["dtype"] in ("float32", "bfloat16", "float16")
        assert row["kernel"] in triton_gpu_launch.KERNELS
        assert 8 <= row["head_dim"] <= 128
        assert row["head_dim"] % 8 == 0
        for side in (row["BLOCK_T"], row["BLOCK_S"]):
            assert side in (16, 32, 64, 128)  # a chunk of 512 keys is whole tiles
        assert row["num_warps"] in (4, 8)
        assert 1 <= row["num_stages"] <= 4


def test_the_shipped_rows_are_legal():
    rows = json.loads(tune.FILE.read_text())
    _legal(rows)
    assert tune.written(sorted(rows, key=tune._key)) == tune.FILE.read_text()
    assert len(triton_gpu_launch.measured()) == len(rows)


def test_a_row_goes_before_the_rule(monkeypatch):
    found = {"BLOCK_T": 128, "BLOCK_S": 32, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(triton_gpu_launch, "measured", lambda: {(0, "bfloat16", 64, "dq"): found})
    asked = (64, torch.bfloat16, torch.device("cpu"))
    assert triton_gpu_launch.options("dq", *asked, gathers=False) == found | {"WARPS": 8}
    rule = triton_gpu_launch.rule("forward", 64, torch.bfloat16, 0)
    assert triton_gpu_launch.options("forward", *asked, gathers=False) == rule | {"WARPS": rule["num_warps"]}


def test_a_row_takes_its_own_place_alone():
    new, other = ROW | {"gain": 0.2}, ROW | {"capability": 80}
    assert tune.merged([ROW, other], tune._key(ROW), new) == [other, new]
    assert tune.merged([ROW, other], tune._key(ROW), None) == [other]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_the_first_candidate(dtype):
    for kernel in triton_gpu_launch.KERNELS:
        found = tune.candidates(kernel, 80, dtype, 90)
        assert found[0] == triton_gpu_launch.rule(kernel, 80, dtype, 90)
        assert len({tuple(options.values()) for options in found}) == len(found) > 60
