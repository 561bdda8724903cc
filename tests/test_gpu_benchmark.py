"""`python -m benchmarks.gpu` without a GPU: its whole flow, so that the first minute on one is not spent on a typo."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
STAGES = [
    *("parity", "repeats", "tests", "cold start", "compile", "prefix_attention, pretraining", "memory", "base_step"),
    *("prefix_attention", "batch_norm_act", "embed_sequence", "demo_step"),
]
WITHOUT_TRITON = ("base_step", "demo_step")  # a whole model in the interpreter takes minutes


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
    assert report["parity"]["red"] == report["repeats"]["different"] == report["compile"]["failed"] == []
    assert report["cold_start"]["first_call_s"] > 0
    for op, found in report["contests"].items():
        assert found == {"timed": 3 if op == "prefix_attention" else 1, "skipped": [], "failed": []}
        rows = json.loads((tmp_path / f"{op}.json").read_text())["benchmarks"][0]["extra_info"]["rows"]
        if op not in WITHOUT_TRITON:
            assert [row["reason"] for row in rows if row["name"] == "simvlm triton"] == [None]
        assert (tmp_path / f"{op}.md").stat().st_size > 500
        assert (tmp_path / f"{op}.png").stat().st_size > 5000
    page = (tmp_path / "README.md").read_text()
    for said in ("dry run", "2 of grid_row", "[base_step](base_step.md)", "| memory | done |", "not measured"):
        assert said in page
    assert str(ROOT) not in page
    assert done.stdout.splitlines()[-1] == f"written: {tmp_path / 'README.md'}"


def test_no_time_is_told_and_no_gpu_refused(tmp_path):
    import torch

    if not torch.cuda.is_available():
        done = _run(f"--out={tmp_path}")
        assert done.returncode == 2
        assert "there is no NVIDIA GPU here" in done.stderr
