"""`python -m benchmarks.gpu` without a GPU: its whole flow, so that the first minute on one is not spent on a typo."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ["parity", "repeats", "cold start", "prefix_attention", "batch_norm_act", "embed_sequence", "demo_step"]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_dry_run_goes_through_every_stage(tmp_path):
    done = _run("--dry-run", f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(stage["stage"], stage["failed"]) for stage in report["stages"]] == [(name, None) for name in STAGES]
    assert report["parity"]["cases"] >= 6
    assert report["parity"]["red"] == report["repeats"]["different"] == []
    assert report["cold_start"]["first_call_s"] > 0
    for op in STAGES[3:]:
        assert report[op]["contests"] >= 1
        rows = json.loads((tmp_path / f"{op}.json").read_text())["benchmarks"][0]["extra_info"]["rows"]
        if op != "demo_step":  # a whole model in the interpreter takes minutes
            assert [row["reason"] for row in rows if row["name"] == "simvlm triton"] == [None]
        assert (tmp_path / f"{op}.md").stat().st_size > 500
        assert (tmp_path / f"{op}.png").stat().st_size > 5000


def test_no_time_is_told_and_no_gpu_refused(tmp_path):
    import torch

    if not torch.cuda.is_available():
        done = _run(f"--out={tmp_path}")
        assert done.returncode == 2
        assert "there is no NVIDIA GPU here" in done.stderr
