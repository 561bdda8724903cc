"""What `python -m benchmarks.gpu` says of a run: goals from made-up contests, the summary, what it needs installed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import attention_cases, base_step, gpu_checks, gpu_summary, record, render
from benchmarks.attention_peers import PEERS
from benchmarks.attention_problem import Problem
from benchmarks.goals import goals, stage_goals, visible
from benchmarks.gpu_run import Run
from simvlm.kernels.attention import spec
from simvlm.kernels.attention.spec import Case
from simvlm.model import VARIANTS

ROOT = Path(__file__).parent.parent


def contest(case: str, direction: str, rows: dict[str, float], gflops: float = 1.0, gbytes: float = 1.0) -> Any:
    """Times in ms by name, ours first."""
    ours = next(iter(rows.values()))
    return {
        "case": case,
        "dtype": "bfloat16",
        "direction": direction,
        "baseline": "ours",
        "yardsticks": {"matmul_gflops": [1.0, 1.0], "copy_gbytes_per_s": [3000.0, 5000.0]},
        "rows": [
            {
                "name": name,
                "kind": "peer",
                "reason": None,
                "median_ms": ms,
                "ratio": ms / ours,
                "gflops": gflops,
                "gbytes_per_s": gbytes,
            }
            for name, ms in rows.items()
        ],
    }


def test_goals_of_attention_on_a_gpu() -> None:
    forward = {"ours": 1.0, "ours, no table": 0.8, "FlexAttention": 1.5, "SDPA cuDNN, bare": 1.25}
    both = {"ours": 4.0, "ours, no table": 3.3, "FlexAttention": 7.0, "SDPA cuDNN, bare": 3.25}
    found = [
        contest("gpu_pretrain", "forward", forward, gflops=2.0),
        contest("gpu_pretrain", "both", both),
        contest("gpu_huge", "forward", {"ours": 2.0, "FlexAttention": 1.0}, gflops=3.0),
    ]
    held = {goal.what: goal for goal in goals(found, "prefix_attention", "cuda")}
    share = visible("gpu_pretrain")
    assert 0.5 < share < 1.0
    per_flop = "FLOP/s against cuDNN's without mask and bias, of the pairs that each must compute"
    for what, measured, met in (
        ("gpu_pretrain: forward against FlexAttention", 1.5, True),
        ("gpu_pretrain: forward and backward against FlexAttention", 1.75, False),
        ("gpu_pretrain: forward against FlexAttention, no table", None, None),
        ("gpu_huge: forward against FlexAttention", 0.5, False),
        (f"gpu_pretrain: forward, {per_flop}", 1.25 * share, 1.25 * share >= 0.9),
        (f"gpu_pretrain: backward without table, {per_flop}", 2.0 / 2.5 * share, True),
        ("gpu_pretrain: forward, what the table costs", 25.0, False),
        ("gpu_pretrain: backward, what the table costs", 20.0, False),
        ("gpu_px480: backward, what the table costs", None, None),
        ("gpu_huge (H = 80) against gpu_pretrain (H = 64): forward, FLOP/s", 1.5, True),
        ("gpu_decode_one: forward against FlexAttention", None, None),
    ):
        goal = held.pop(what)
        assert goal.measured == (None if measured is None else pytest.approx(measured)), what
        assert goal.met is met, what
    assert all(goal.met is None for goal in held.values())


def test_other_goals_on_a_gpu() -> None:
    norm = contest("gpu_stem_b128", "both", {"ours": 1.0}, gbytes=3500.0)
    held = {goal.what: goal for goal in goals([norm], "batch_norm_act", "cuda")}
    met = held["gpu_stem_b128: forward and backward, least traffic as a share of a copy's"]
    assert (met.measured, met.met) == (87.5, True)
    step = contest("base", "step", {"ours": 2.0, "eager SDPA": 5.0, "compiled FlexAttention": 2.2})
    assert [goal.met for goal in goals([step], "base_step", "cuda")] == [True, False]
    assert goals([step], "demo_step", "cuda") == []
    assert [goal.met for goal in stage_goals({})] == [None, None]
    report = {"cold_start": {"first_call_s": 7.0, "dtype": "bfloat16"}, "memory": {"growth": 1.1}}
    assert [goal.met for goal in stage_goals(report)] == [False, True]


def test_pages_of_a_gpu_show_floor_copy_and_mfu(tmp_path: Path) -> None:
    (stored,) = ROOT.glob("benchmarks/results/cpu-*/batch_norm_act.json")
    report = json.loads(stored.read_text())
    del report["benchmarks"][2:]
    report["machine_info"]["slug"] = "gpu-nvidia-h200"
    for info in render.contests(report):
        info["least_ms"] = 0.123
        for row in info["rows"]:
            if not row["reason"]:
                row["samples_per_s"] = 77.5
    render.write_pages(report, tmp_path, "batch_norm_act")
    page = (tmp_path / "batch_norm_act.md").read_text()
    for said in (
        "| floor ms | copy GB/s |",
        "| 0.123 |",
        "samples/s | MFU % |",
        "77.5",
        "8192³",
        "## Goals",
        "790 TFLOP/s",
    ):
        assert said in page, said
    console = Console(width=200, record=True, file=io.StringIO())
    for table in render.console_tables(report, "batch_norm_act"):
        console.print(table)
    printed = console.export_text()
    for said in ("floor ms", "0.123", "samples/s", "gpu_stem_b128"):
        assert said in printed, said


def a_run(tmp_path: Path) -> Run:
    machine = {
        "device": "NVIDIA H200",
        "slug": "gpu-nvidia-h200",
        "cpu": {"model": "some", "cores": 16},
        "system": "Linux x86_64",
        "versions": {"python": "3.12.0", "torch": "2.11.0"},
    }
    head = {
        "machine_info": machine,
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-01T00:00:00Z",
        "command": "python -m benchmarks.gpu",
    }
    report: dict[str, Any] = {"head": head, "stages": []}
    return Run(tmp_path, False, 0.0, report)


def test_the_summary_tells_failures_findings_and_goals(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert "0 met, 0 missed" in gpu_summary.page(run)
    stage = {"seconds": 12.3, "failed": None, "left_out": None}
    run.report["stages"] = [
        stage | {"stage": "parity", "failed": "AssertionError: 1 misses"},
        stage | {"stage": "memory"},
        stage | {"stage": "demo_step", "left_out": "left out: needs grain"},
    ]
    run.report |= {
        "parity": {
            "cases": 3,
            "not_judged": 2,
            "dtypes": ["float32"],
            "red": ["prefix_attention smallest float32: out"],
        },
        "tests": {"passed": 4, "failed": ["test_graph"], "skipped": 1},
        "memory": {"heads": 12, "head_dim": 64, "peak_extra_mib": {1024: 20.0, 2048: None}, "growth": 1.05},
        "contests": {"prefix_attention": {"timed": 1, "skipped": ["gpu_long both"], "failed": []}},
    }
    run.contests["prefix_attention"] = [
        {"extra_info": contest("gpu_pretrain", "forward", {"ours": 1.0, "FlexAttention": 1.1})}
    ]
    page, short = gpu_summary.page(run), gpu_summary.short(run)
    for said in (
        "| parity | failed: AssertionError: 1 misses | 12 |",
        "| demo_step | left out: needs grain | 12 |",
        "* tests: 4 passed, 1 failed, 1 skipped",
        "    * test_graph",
        "1024: 20.0, 2048: unknown",
        "* prefix_attention, no time left: gpu_long both",
        "[prefix_attention](prefix_attention.md)",
        "| gpu_pretrain: forward against FlexAttention | bfloat16 | ≥ 1.3 × | 1.10 × | no |",
        "1 met, 1 missed",
    ):
        assert said in page, said
    assert "parity: failed: AssertionError: 1 misses" in short
    assert "missed: gpu_pretrain: forward against FlexAttention, bfloat16, ≥ 1.3 ×, 1.10 ×" in short
    assert "memory: done" not in short


def test_memory_that_grows_faster_than_the_sequence_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    monkeypatch.setattr(gpu_checks, "_peak_mib", lambda length, *rest: 5.0 + length / 100)
    gpu_checks.measure_memory(run)
    assert run.report["memory"]["growth"] < 1
    monkeypatch.setattr(gpu_checks, "_peak_mib", lambda length, *rest: length / 100 + length**2 / 2**20)
    with pytest.raises(AssertionError, match="times as fast as T"):
        gpu_checks.measure_memory(run)


def test_the_floor_is_the_specs() -> None:
    case = attention_cases.named("gpu_pretrain")
    for direction in ("forward", "both"):
        subject = record.Subject(
            op="",
            case="",
            shape="",
            dtype="bfloat16",
            direction=direction,
            flops=spec.flops(case, direction),
            bytes_moved=spec.bytes_moved(case, direction, 2),
            flops_formula="",
            bytes_formula=None,
        )
        assert subject.least_ms == spec.least_ms(case, direction, 2)


def test_gpu_cases_own_every_row() -> None:
    """Their inputs are drawn on the device, without the zeros of rows that nobody owns."""
    for case in attention_cases.GPU_BENCHMARKS:
        layout = case.layout()
        assert case.padded is not None or case.tail == 0
        if case.padded is not None:
            assert set(zip(layout.q_lens, layout.k_lens, strict=True)) == {case.padded}
        assert (layout.prefix_lens <= layout.k_lens).all()


@pytest.mark.parametrize("name", ["SDPA math, bias built", "SDPA math, bias ready"])
def test_peers_by_backend_compute_the_same(name: str) -> None:
    """The one backend that every device has; the others differ in its name."""
    case = Case(name="tiny", q_lens=(13, 9), prefix_lens=(12, 3), image_grid=(3, 4), padded=(13, 13), head_dim=16)
    problem = Problem(case, "float32", "cpu")
    peer = next(peer for peer in PEERS if peer.name == name)
    assert not peer.takes_part(problem, "forward")
    out = peer.prepare(problem)(*(problem.stored[key] for key in "qkv"), problem.table)
    assert problem.error(out, packed=False) < 1e-6


def test_rivals_of_the_base_step_lose_the_same() -> None:
    problem = base_step.Problem(VARIANTS["demo"], 3, 2, "float32", "cpu")
    ours, rival = problem.ours(), problem.rival("eager SDPA")
    for _ in range(2):  # the second step's loss knows of the first one's gradients
        torch.testing.assert_close(rival.call(), ours.call(), rtol=1e-4, atol=0.0)
    assert base_step.flops(VARIANTS["demo"], problem.batch) > 0


def test_it_needs_no_more_than_it_says() -> None:
    absent = ("grain", "sentencepiece", "yaml", "tyro", "safetensors", "ml_dtypes", "jax")
    program = f"""
import sys
for name in {absent!r}: sys.modules[name] = None
from benchmarks import gpu
from benchmarks.gpu_run import NeedsError
for op in gpu.MODULES:
    try: print(op, len(gpu.contests(False, op)))
    except NeedsError as error: print(op, 'needs', error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == ["prefix_attention 16", "base_step 1", "batch_norm_act 8", "embed_sequence 2"]
    assert said[4].startswith("demo_step needs ")
